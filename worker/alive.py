"""python -m worker.alive: whether the worker beside it still beats, for a container's probes.

It looks at the time of STIEFEL_ALIVE_FILE and asks neither database nor broker: with those away a worker trains on, and
must not be killed for it.
"""

import argparse
import sys
import time
from pathlib import Path

from jobs.settings import Settings

# So many beats may be late, and no fewer seconds: each may wait for a database that is silent.
_BEATS = 6
_LEAST_SECONDS = 60.0


def problem(file: Path | None, most_seconds: float) -> str | None:
    """What is wrong; None if the file was touched within so many seconds."""
    if file is None:
        return "STIEFEL_ALIVE_FILE is not set: the worker does not say whether it beats"
    try:
        age = time.time() - file.stat().st_mtime
    except OSError as error:
        return f"{file}: {error.strerror}; the worker has not begun to beat"
    return f"the last beat was {age:.0f} s ago, more than {most_seconds:g} s" if age > most_seconds else None


def main() -> int:
    settings = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m worker.alive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: STIEFEL_ALIVE_FILE=/tmp/alive python -m worker.alive --seconds 60",
    )
    default = max(_LEAST_SECONDS, _BEATS * settings.beat_seconds)
    parser.add_argument("--seconds", type=float, default=default, help=f"oldest beat. Default: {default:g}")
    found = problem(settings.alive_file, parser.parse_args().seconds)
    print(found or "the worker beats", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
