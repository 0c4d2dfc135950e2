"""A worker that takes what is next, sees it through and ends: what a cluster starts for each job that waits.

It needs no broker: whoever started it has looked into the database.
"""

import signal
import threading
import time

from jobs.database import Database
from jobs.settings import Settings
from trainer import tracing
from worker.devices import card as card_of
from worker.presence import Presence
from worker.supervise import run_next


def run(settings: Settings) -> None:
    """SIGTERM: the trainer checkpoints, and its job goes back to the queue."""
    tracing.start("worker", settings.traces)
    card = card_of(settings)
    shutdown, known = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shutdown.set())
    presence = Presence(settings, card, lambda _drained: known.set())
    presence.start()
    database = Database(settings.url)
    try:
        # Its name will be on a job: whoever looks it up shall find it.
        deadline = time.monotonic() + settings.lease_seconds
        while not known.wait(settings.poll_seconds) and not shutdown.is_set() and time.monotonic() < deadline:
            pass
        # No job was announced to this worker in particular.
        if not shutdown.is_set():
            run_next(database, settings, card, "", shutdown.is_set)
    finally:
        database.close()
        presence.end()
