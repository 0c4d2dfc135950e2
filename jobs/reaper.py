"""python -m jobs.reaper: the process that keeps promises when nobody else is awake. Run one or several.

With --metrics-port it is Prometheus' exporter too.
"""

import argparse
import logging
import signal
import threading

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from jobs import deliveries, places, schedule, upkeep, workers
from jobs.database import Database
from jobs.deliveries import Deliverer
from jobs.exporter import Exporter
from jobs.queue import BROKER_ERRORS, Doorbell
from jobs.settings import Settings
from trainer import logs

log = logging.getLogger("stiefel.reaper")


def run(database: Database, settings: Settings, stop: threading.Event, exporter: Exporter | None = None) -> None:
    """Until `stop` is set. A database or broker that is away is waited for, not died of."""
    doorbell, deliverer = Doorbell(settings), Deliverer(database, settings)
    while not stop.wait(settings.upkeep_seconds):
        well = _round(database, settings, doorbell, deliverer)
        if exporter is not None:
            exporter.rounds.ended(well)
    deliverer.close()


def _round(database: Database, settings: Settings, doorbell: Doorbell, deliverer: Deliverer) -> bool:
    """Whether database and broker answered."""
    try:
        upkeep.requeue_lost(database, settings)
        if settings.preemption and (preempted := schedule.preempt(database, settings)):
            log.info("%d jobs make room for others", preempted)
        deliverer.start_due()
        deliveries.forget(database)
        wanted = upkeep.queues(database, settings)
        waiting = doorbell.waiting(wanted)
        if again := upkeep.announce_again(database, settings, waiting):
            log.info("%d jobs are announced again", again)
        for queue, keep in upkeep.overfull(waiting, wanted).items():
            doorbell.forget(queue, keep)
        upkeep.publish_due(database, settings, doorbell.ring)
        workers.forget(database)
        places.forget(database)
    except OperationalError as error:
        log.warning("the database cannot be asked: %s", error.orig)
    except BROKER_ERRORS as error:
        log.warning("the broker is away: %s", error)
    except SQLAlchemyError:
        log.exception("the database refuses; the next round tries again")
    else:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.reaper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m jobs.reaper --metrics-port 9464",
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="answer Prometheus at /metrics, which asks for no API key"
    )
    parser.add_argument(
        "--metrics-host",
        default="127.0.0.1",
        metavar="HOST",
        help="of which interface; 0.0.0.0: all, where only Prometheus gets there. Default: 127.0.0.1",
    )
    arguments = parser.parse_args()
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database, exporter = Database(settings.url), None
    if arguments.metrics_port is not None:
        exporter = Exporter(database, settings, arguments.metrics_host, arguments.metrics_port)
        exporter.start()
        log.info("metrics at http://%s:%d/metrics", arguments.metrics_host, exporter.port)
    run(database, settings, stop, exporter)
    if exporter is not None:
        exporter.close()
    database.close()


if __name__ == "__main__":
    main()
