"""python -m jobs.reaper: the process that keeps promises when nobody else is awake. Run one or several."""

import argparse
import logging
import signal
import threading

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from jobs import schedule, upkeep, workers
from jobs.database import Database
from jobs.queue import BROKER_ERRORS, Doorbell
from jobs.settings import Settings

log = logging.getLogger("stiefel.reaper")


def run(settings: Settings, stop: threading.Event) -> None:
    """Until `stop` is set. A database or broker that is away is waited for, not died of."""
    database, doorbell = Database(settings.url), Doorbell(settings)
    while not stop.wait(settings.upkeep_seconds):
        try:
            if requeued := upkeep.requeue_lost(database, settings):
                log.warning("%d jobs of lost workers are queued again or ended", requeued)
            if settings.preemption and (preempted := schedule.preempt(database, settings)):
                log.info("%d jobs make room for others", preempted)
            waiting = doorbell.waiting(upkeep.queues(database, settings))
            if again := upkeep.announce_again(database, settings, waiting):
                log.info("%d jobs are announced again", again)
            upkeep.publish_due(database, settings, doorbell.ring)
            workers.forget(database)
        except OperationalError as error:
            log.warning("the database cannot be asked: %s", error.orig)
        except BROKER_ERRORS as error:
            log.warning("the broker is away: %s", error)
        except SQLAlchemyError:
            log.exception("the database refuses; the next round tries again")
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.reaper", description=__doc__)
    parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run(Settings(), stop)


if __name__ == "__main__":
    main()
