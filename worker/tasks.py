"""The Celery worker: celery -A worker.tasks worker. One job at a time, one worker per set of GPUs."""

import logging
import multiprocessing
import socket
import threading
from typing import Any

from celery import signals
from sqlalchemy.exc import SQLAlchemyError

from jobs import upkeep
from jobs.database import Database
from jobs.queue import TRAIN, make_celery
from jobs.settings import Settings
from worker.supervise import run_job

log = logging.getLogger("stiefel.worker")

settings = Settings()
app = make_celery(settings)
name = settings.worker or f"{socket.gethostname()}:{settings.gpus or 'cpu'}"

# Set in the main process when it is told to end, seen in the child that supervises; made before the child is forked.
_shutdown = multiprocessing.Event()


@app.task(name=TRAIN)
def train(job_id: str) -> None:
    database = Database(settings.url)
    try:
        run_job(database, settings, name, job_id, _shutdown.is_set)
    finally:
        database.close()


@signals.worker_ready.connect
def _say_hello(**_: Any) -> None:
    threading.Thread(target=_keep_saying_hello, daemon=True).start()


def _keep_saying_hello() -> None:
    database = Database(settings.url)
    while not _shutdown.is_set():
        try:
            upkeep.worker_seen(database, name, settings.gpus)
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
        upkeep.worker_gone(database, name)
    except SQLAlchemyError as error:
        log.warning("the database is away, this worker will be taken for lost: %s", error)
    finally:
        database.close()
