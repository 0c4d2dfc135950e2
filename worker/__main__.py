"""python -m worker: a Celery worker with the options that one worker per GPU set needs."""

import argparse

from worker.tasks import app, card, queues


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m worker",
        description=__doc__,
        epilog="example: STIEFEL_GPUS=0,1 STIEFEL_REDIS_URL=redis://broker:6379/0 python -m worker",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    arguments = parser.parse_args()
    app.worker_main(
        [
            *("worker", "--pool", "prefork", "--concurrency", "1", "--queues", ",".join(queues)),
            *("--hostname", f"stiefel@{card.name}", "--loglevel", arguments.log_level),
            *("--without-gossip", "--without-mingle"),
        ]
    )


if __name__ == "__main__":
    main()
