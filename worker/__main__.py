"""python -m worker: takes jobs, one at a time, with one set of GPUs.

A Celery worker with the options for that; with --once it takes one job without Celery, and ends with it.
"""

import argparse

from jobs.settings import Settings
from worker import once


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: STIEFEL_GPUS=0,1 STIEFEL_REDIS_URL=redis://broker:6379/0 python -m worker",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument(
        "--once",
        action="store_true",
        help="take the job that is next for this worker, if there is one, and end",
    )
    arguments = parser.parse_args()
    if arguments.once:
        once.run(Settings())
    else:
        _listen(arguments.log_level)


def _listen(log_level: str) -> None:
    # Only now: it reads the settings and looks at the devices.
    from worker.tasks import app, card, queues

    app.worker_main(
        [
            *("worker", "--pool", "prefork", "--concurrency", "1", "--queues", ",".join(queues)),
            *("--hostname", f"stiefel@{card.name}", "--loglevel", log_level),
            *("--without-gossip", "--without-mingle"),
        ]
    )


if __name__ == "__main__":
    main()
