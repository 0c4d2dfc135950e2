"""One job, from the claim to the end of its attempt: start the trainer, store what it reports, pass on what users want.

A database that is away does not end a healthy run: events stay in events.jsonl and are stored later. Only when most of
the lease has passed is the trainer asked to checkpoint and end, and when all of it has, it is killed: from then on
somebody else may start the same job.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from jobs import lease as leases
from jobs import store
from jobs.database import Database
from jobs.errors import LeaseLost
from jobs.lease import Lease, Outcome, Wishes
from jobs.settings import Settings
from jobs.tables import Job
from trainer.events import Event, read_from
from trainer.rundir import RunDir
from worker.launch import Locks, Trainer, locks_of, prepare, start
from worker.outcome import outcome_of

log = logging.getLogger("stiefel.worker")

Answer = TypeVar("Answer")


def run_job(database: Database, settings: Settings, worker: str, job_id: str, shutdown: Callable[[], bool]) -> None:
    """Claim the job and see it through; nothing happens if it is not to be claimed.

    `shutdown` says whether this worker is to end: the trainer then checkpoints and the job goes back to the queue.
    """
    job = store.get(database, job_id)
    locks = locks_of(settings, worker, job.run_directory)
    if not _wait_for(locks, settings, shutdown):
        return
    try:
        # Counted from before the question: the database counts from when it answers, which is later.
        lease_ends = time.monotonic() + settings.lease_seconds
        lease = leases.claim(database, settings, job_id, worker)
        if lease is None:
            log.info("%s is not to be claimed: it runs elsewhere, waits, or has ended", job_id)
            return
        _Attempt(database, settings, lease, job, locks, shutdown, lease_ends).run()
    finally:
        locks.release()


def _wait_for(locks: Locks, settings: Settings, shutdown: Callable[[], bool]) -> bool:
    """A trainer of an earlier worker may still be writing its last checkpoint. False: not now, and nothing is held."""
    deadline = time.monotonic() + settings.grace_seconds
    while not shutdown():
        if locks.try_acquire():
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(settings.poll_seconds)
    log.warning("the GPUs or the run directory are in use, or this worker ends; the job will be announced again")
    return False


@dataclass
class _Attempt:
    database: Database
    settings: Settings
    lease: Lease
    job: Job
    locks: Locks
    shutdown: Callable[[], bool]
    lease_ends: float
    wishes: Wishes = Wishes(cancel=False, pause=False)
    offset: int = 0
    found: list[Event] = field(default_factory=list)  # what this attempt has reported so far

    def run(self) -> None:
        try:
            outcome = self._train()
        except LeaseLost as error:
            log.warning("%s; its trainer is killed and nothing more is written", error)
            return
        except Exception as error:
            # Whatever it is, the job must not stay behind as running: it is told, and tried again.
            log.exception("%s: the supervisor failed", self.lease.job_id)
            message = f"the worker failed: {type(error).__name__}: {error}"
            outcome = Outcome("failed", None, {"code": "infrastructure", "message": message}, retryable=True)
        self._finish(outcome)

    def _train(self) -> Outcome:
        """Start the trainer and stay with it to its end. Raises LeaseLost."""
        rundir = prepare(self.job)
        self.offset = self._patiently(lambda: leases.events_offset(self.database, self.lease))
        trainer = start(rundir, self.settings, self.locks)
        log.info("%s: attempt %d, trainer %d", self.lease.job_id, self.lease.fence, trainer.process.pid)
        watchdog = threading.Thread(target=self._kill_without_lease, args=(trainer,), daemon=True)
        watchdog.start()
        try:
            killed = self._accompany(rundir, trainer)
            self._patiently(lambda: self._store_events(rundir))
        finally:
            # Whatever went wrong here, no trainer is left behind without a supervisor.
            trainer.kill()
        if time.monotonic() > self.lease_ends:
            raise LeaseLost(self.lease.job_id, self.lease.fence)
        return outcome_of(rundir, trainer.process.returncode, self.found, killed)

    def _accompany(self, rundir: RunDir, trainer: Trainer) -> bool:
        """Until the trainer ends. True if it had to be killed because it did not stop when asked to."""
        next_beat = 0.0
        stop_asked: float | None = None
        while trainer.process.poll() is None:
            try:
                if time.monotonic() >= next_beat:
                    self._beat()
                    next_beat = time.monotonic() + self.settings.beat_seconds
                self._store_events(rundir)
            except DBAPIError as error:
                log.warning("the database is away; events wait in the run directory: %s", error.orig)
            if stop_asked is None and self._should_stop():
                rundir.stop.touch()
                stop_asked = time.monotonic()
            if stop_asked is not None and time.monotonic() > stop_asked + self.settings.grace_seconds:
                log.warning("%s: no step boundary within the grace period; killing it", self.lease.job_id)
                trainer.kill()
                return True
            _sleep_until_exit(trainer, self.settings.poll_seconds)
        return False

    def _should_stop(self) -> bool:
        """Somebody wishes it, this worker ends, or the lease will be lost soon: time for a checkpoint is kept."""
        lease_ends_soon = time.monotonic() > self.lease_ends - self.settings.lease_seconds / 4
        return self.wishes.cancel or self.wishes.pause or lease_ends_soon or self.shutdown()

    def _beat(self) -> None:
        asked = time.monotonic()
        self.wishes = leases.beat(self.database, self.settings, self.lease)
        self.lease_ends = asked + self.settings.lease_seconds

    def _store_events(self, rundir: RunDir) -> None:
        found, offset = read_from(rundir.events, self.offset)
        if offset > self.offset:
            leases.record(self.database, self.lease, found, offset)
            self.offset = offset
            self.found += [event for _, event in found]

    def _kill_without_lease(self, trainer: Trainer) -> None:
        """The deadline holds even while this worker waits for an answer of the database."""
        while trainer.process.poll() is None:
            if time.monotonic() > self.lease_ends:
                log.warning("%s: the lease has run out; its trainer is killed", self.lease.job_id)
                trainer.kill()
            time.sleep(min(0.5, self.settings.poll_seconds))

    def _finish(self, outcome: Outcome) -> None:
        try:
            state = self._patiently(lambda: leases.finish(self.database, self.settings, self.lease, outcome))
        except LeaseLost as error:
            log.warning("%s; the outcome is not written", error)
            return
        log.info("%s: attempt %d %s → %s", self.lease.job_id, self.lease.fence, outcome.kind, state)

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask the database until it answers or the lease has run out. Raises LeaseLost."""
        while True:
            try:
                return ask()
            except DBAPIError as error:
                if time.monotonic() > self.lease_ends:
                    raise LeaseLost(self.lease.job_id, self.lease.fence) from error
                log.warning("the database is away; asking again: %s", error.orig)
                time.sleep(self.settings.poll_seconds)


def _sleep_until_exit(trainer: Trainer, seconds: float) -> None:
    """Sleep, but wake up when the trainer ends."""
    deadline = time.monotonic() + seconds
    while trainer.process.poll() is None and time.monotonic() < deadline:
        time.sleep(min(0.05, seconds))
