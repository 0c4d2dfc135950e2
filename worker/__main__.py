"""python -m worker: takes jobs, one at a time, with one set of GPUs.

A Celery worker with the options for that; with --once it takes one job without Celery, and ends with it.
"""

import argparse
import sys

from jobs.settings import Settings
from trainer import logs, tracing
from worker import once
from worker.devices import NoGpus


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: STIEFEL_GPUS=0,1 STIEFEL_REDIS_URL=redis://broker:6379/0 python -m worker",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="take the job that is next for this worker, if there is one, and end",
    )
    arguments, settings = parser.parse_args(), Settings()
    # Before Celery is here to say anything.
    logs.configure(settings.log_format, settings.log_level)
    try:
        # Celery would go on without, in the child that it forks.
        tracing.check(settings.traces)
        if arguments.once:
            once.run(settings)
        else:
            _listen()
    except (NoGpus, tracing.TracingError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 1
    return 0


def _listen() -> None:
    # Only now: it reads the settings and looks at the devices.
    from worker.tasks import app, card, queues

    app.worker_main(
        [
            "--quiet",
            *("worker", "--pool", "prefork", "--concurrency", "1", "--queues", ",".join(queues)),
            *("--hostname", f"stiefel@{card.name}"),
            *("--without-gossip", "--without-mingle"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
