"""One job, from the claim to the end of its attempt: start the trainer, store what it reports, pass on what users want.

A database that is away does not end a healthy run: events stay in events.jsonl and are stored later. Only when most of
the lease has passed is the trainer asked to checkpoint and end, and when all of it has, it is killed: from then on
somebody else may start the same job.
"""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from jobs import lease as leases
from jobs import store
from jobs.database import Database
from jobs.errors import LeaseLost
from jobs.lease import Lease, Outcome, Wishes
from jobs.settings import Settings
from trainer.events import Event, Failed, Finished, Stopped, read_from
from trainer.rundir import RunDir
from worker.launch import GpuLock, Trainer, prepare, start

log = logging.getLogger("stiefel.worker")

_LOG_TAIL_BYTES = 4000


def run_job(database: Database, settings: Settings, worker: str, job_id: str, shutdown: Callable[[], bool]) -> None:
    """Claim the job and see it through; nothing happens if it is not to be claimed.

    `shutdown` says whether this worker is to end: the trainer then checkpoints and the job goes back to the queue.
    """
    lock = GpuLock(settings, settings.gpus or worker)
    if not _wait_for(lock, settings, shutdown):
        return
    try:
        lease = leases.claim(database, settings, job_id, worker)
        if lease is None:
            log.info("%s is not to be claimed: it runs elsewhere, or has ended", job_id)
            return
        _Attempt(database, settings, lease, lock, shutdown).run()
    finally:
        lock.release()


def _wait_for(lock: GpuLock, settings: Settings, shutdown: Callable[[], bool]) -> bool:
    """A trainer of an earlier worker may still be writing its last checkpoint on these GPUs."""
    deadline = time.monotonic() + settings.grace_seconds
    while not lock.try_acquire():
        if shutdown() or time.monotonic() > deadline:
            log.warning("the GPUs of this worker are still in use; the job waits for another announcement")
            return False
        time.sleep(settings.poll_seconds)
    return True


@dataclass
class _Attempt:
    database: Database
    settings: Settings
    lease: Lease
    lock: GpuLock
    shutdown: Callable[[], bool]

    def run(self) -> None:
        settings = self.settings
        rundir = prepare(store.get(self.database, self.lease.job_id))
        self._offset = leases.events_offset(self.database, self.lease)
        self._last: Event | None = None
        self._wishes = Wishes(cancel=False, pause=False)
        self._lease_ends = time.monotonic() + settings.lease_seconds
        next_beat = 0.0
        stop_asked: float | None = None

        trainer = start(rundir, settings, self.lock)
        log.info("%s: attempt %d, trainer %d", self.lease.job_id, self.lease.fence, trainer.process.pid)
        try:
            while trainer.process.poll() is None:
                try:
                    if time.monotonic() >= next_beat:
                        self._beat()
                        next_beat = time.monotonic() + settings.beat_seconds
                    self._store_events(rundir)
                except OperationalError as error:
                    log.warning("the database is away; events wait in the run directory: %s", error.orig)
                if stop_asked is None and self._should_stop():
                    rundir.stop.touch()
                    stop_asked = time.monotonic()
                if stop_asked is not None and time.monotonic() > stop_asked + settings.grace_seconds:
                    log.warning("%s: no step boundary within the grace period; killing it", self.lease.job_id)
                    trainer.kill()
                if time.monotonic() > self._lease_ends:
                    raise LeaseLost(self.lease.job_id, self.lease.fence)
                _sleep_until_exit(trainer, settings.poll_seconds)
            self._settle(rundir, trainer.process.returncode)
        except LeaseLost as error:
            log.warning("%s; its trainer is killed and nothing more is written", error)
        finally:
            # Whatever went wrong here, no trainer is left behind without a supervisor.
            trainer.kill()

    def _should_stop(self) -> bool:
        """Somebody wishes it, this worker ends, or the lease will be lost soon: time for a checkpoint is kept."""
        lease_ends_soon = time.monotonic() > self._lease_ends - self.settings.lease_seconds / 4
        return self._wishes.cancel or self._wishes.pause or lease_ends_soon or self.shutdown()

    def _store_events(self, rundir: RunDir) -> None:
        found, offset = read_from(rundir.events, self._offset)
        if not found:
            return
        events = [event for _, event in found]
        leases.record(self.database, self.lease, events, offset)
        self._offset, self._last = offset, events[-1]

    def _beat(self) -> None:
        asked = time.monotonic()
        self._wishes = leases.beat(self.database, self.settings, self.lease)
        # From before the question: the database counts from when it answered, which is later.
        self._lease_ends = asked + self.settings.lease_seconds

    def _settle(self, rundir: RunDir, exit_code: int) -> None:
        """Store the last events and the outcome, trying for as long as the lease may stand."""
        while True:
            try:
                self._store_events(rundir)
                outcome = self._outcome(rundir, exit_code)
                state = leases.finish(self.database, self.settings, self.lease, outcome)
                log.info("%s: attempt %d %s → %s", self.lease.job_id, self.lease.fence, outcome.kind, state)
                return
            except OperationalError as error:
                if time.monotonic() > self._lease_ends:
                    raise LeaseLost(self.lease.job_id, self.lease.fence) from error
                log.warning("the database is away, the outcome waits: %s", error.orig)
                time.sleep(self.settings.poll_seconds)

    def _outcome(self, rundir: RunDir, exit_code: int) -> Outcome:
        """What the exit code and the last event say together; the event says more."""
        failure = _last_failure(rundir, self._last)
        if exit_code == 0 and isinstance(self._last, Finished):
            return Outcome("succeeded", exit_code)
        if exit_code == 0 and isinstance(self._last, Stopped):
            return Outcome("stopped", exit_code)
        tail = rundir.log_tail(_LOG_TAIL_BYTES)
        if failure:
            error = {"code": failure.reason, "message": failure.message, "rank": failure.rank, "log_tail": tail}
            return Outcome("failed", exit_code, error, failure.retryable)
        if exit_code < 0:
            name = signal.Signals(-exit_code).name
            hint = "; on Linux this is often the kernel ending the largest process for lack of memory"
            message = f"the trainer was ended by {name}{hint if name == 'SIGKILL' else ''}"
            return Outcome("failed", exit_code, {"code": "killed", "message": message, "log_tail": tail}, True)
        message = f"the trainer ended with exit code {exit_code} and said nothing; see the log"
        return Outcome("failed", exit_code, {"code": "unknown", "message": message, "log_tail": tail}, True)


def _last_failure(rundir: RunDir, last: Event | None) -> Failed | None:
    """The failure that ended the attempt: several ranks may have failed, the first of them is the cause."""
    if not isinstance(last, Failed):
        return None
    try:
        events = [event for _, event in read_from(rundir.events, 0)[0]]
    except ValidationError:
        return last
    first = last
    for event in reversed(events):
        if not isinstance(event, Failed):
            break
        first = event
    return first


def _sleep_until_exit(trainer: Trainer, seconds: float) -> None:
    """Sleep, but wake up when the trainer ends."""
    deadline = time.monotonic() + seconds
    while trainer.process.poll() is None and time.monotonic() < deadline:
        time.sleep(min(0.05, seconds))
