"""The Celery worker: python -m worker. One job at a time, one worker per set of GPUs."""

import logging
import multiprocessing
import threading
from typing import Any

from celery import signals
from sqlalchemy.exc import SQLAlchemyError

from jobs import workers
from jobs.database import Database
from jobs.queue import TRAIN, make_celery, queues_of
from jobs.settings import Settings
from worker.devices import card as card_of
from worker.supervise import run_next

log = logging.getLogger("stiefel.worker")

settings = Settings()
app = make_celery(settings)
card = card_of(settings)
queues = queues_of(settings, card)

# Set in the main process when it is told to end, seen in the child that supervises; made before the child is forked.
_shutdown = multiprocessing.Event()


@app.task(name=TRAIN)
def train(job_id: str) -> None:
    database = Database(settings.url)
    try:
        run_next(database, settings, card, job_id, _shutdown.is_set)
    finally:
        database.close()


@signals.worker_ready.connect
def _say_hello(sender: Any, **_: Any) -> None:
    threading.Thread(target=_keep_saying_hello, args=(sender,), daemon=True).start()


def _keep_saying_hello(consumer: Any) -> None:
    """`consumer`: Celery's, which stops listening while the worker is drained: messages are for others then."""
    database, listening = Database(settings.url), True
    while not _shutdown.is_set():
        try:
            drained = workers.seen(database, card)
            if drained == listening:
                listening = not drained
                listen = consumer.add_task_queue if listening else consumer.cancel_task_queue
                for queue in queues:
                    consumer.call_soon(listen, queue)
        except SQLAlchemyError as error:
            log.warning("the database is away, this worker is not announced: %s", error)
        _shutdown.wait(settings.beat_seconds)


@signals.worker_shutting_down.connect
def _begin_shutdown(**_: Any) -> None:
    _shutdown.set()


@signals.worker_shutdown.connect
def _say_goodbye(**_: Any) -> None:
    database = Database(settings.url)
    try:
        workers.left(database, card.name)
    except SQLAlchemyError as error:
        log.warning("the database is away, this worker will be taken for lost: %s", error)
    finally:
        database.close()
