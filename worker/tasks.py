"""The Celery worker: python -m worker. One job at a time, one worker per set of GPUs."""

import multiprocessing
from typing import Any

from celery import signals

from jobs.database import Database
from jobs.queue import TRAIN, make_celery, queues_of
from jobs.settings import Settings
from trainer import tracing
from worker.devices import card as card_of
from worker.presence import Presence
from worker.supervise import run_next

settings = Settings()
app = make_celery(settings)
card = card_of(settings)
queues = queues_of(settings, card)

# Set in the main process when it is told to end, seen in the child that supervises; made before the child is forked.
_shutdown = multiprocessing.Event()
_presence: Presence | None = None


@app.task(name=TRAIN)
def train(job_id: str) -> None:
    database = Database(settings.url)
    try:
        run_next(database, settings, card, job_id, _shutdown.is_set)
    finally:
        database.close()


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    """Celery leaves them as they are, because somebody listens here."""


@signals.worker_process_init.connect
def _begin_traces(**_: Any) -> None:
    """In the child that supervises: threads that send traces do not survive a fork."""
    tracing.start("worker", settings.traces)


@signals.worker_ready.connect
def _say_hello(sender: Any, **_: Any) -> None:
    global _presence
    _presence = Presence(settings, card, _Listening(sender).unless)
    _presence.start()


class _Listening:
    """Celery's consumer, which stops listening while the worker is drained: messages are for others then."""

    def __init__(self, consumer: Any) -> None:
        self._consumer, self._listens = consumer, True

    def unless(self, drained: bool) -> None:
        if drained == self._listens and not _shutdown.is_set():
            self._listens = not drained
            listen = self._consumer.add_task_queue if self._listens else self._consumer.cancel_task_queue
            for queue in queues:
                self._consumer.call_soon(listen, queue)


@signals.worker_shutting_down.connect
def _begin_shutdown(**_: Any) -> None:
    _shutdown.set()


@signals.worker_shutdown.connect
def _say_goodbye(**_: Any) -> None:
    if _presence is not None:
        _presence.end()
