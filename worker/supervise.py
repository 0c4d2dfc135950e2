"""One job, from the claim to the end of its attempt: start the trainer, store what it reports, pass on what users want.

A database that is away does not end a healthy run: events stay in events.jsonl and are stored later. Only when most of
the lease has passed is the trainer asked to checkpoint and end, and when all of it has, it is killed: from then on
somebody else may start the same job.
"""

import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from jobs import lease as leases
from jobs import reports, results, schedule, upkeep, workers
from jobs.database import Database
from jobs.errors import JobsError, LeaseLost
from jobs.lease import Lease, Outcome, Wishes
from jobs.locks import Locks, device_locks, run_lock
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.tables import Job
from jobs.workers import Card
from trainer import logs, tracing
from trainer.checkpoint import retention
from trainer.events import Event, read_from
from trainer.rundir import RunDir
from worker import inputs, orphans
from worker.inputs import Made, Unmade
from worker.kernel import out_of_memory_kills
from worker.launch import Trainer, environment_of, prepare, start
from worker.outcome import outcome_of

log = logging.getLogger("stiefel.worker")

# How large the run directory is, is looked at this often.
_SECONDS_BETWEEN_MEASUREMENTS = 60.0
Answer = TypeVar("Answer")


def run_next(database: Database, settings: Settings, card: Card, announced: str, shutdown: Callable[[], bool]) -> None:
    """Claim the job that is next for this worker and see it through; nothing happens if there is none.

    `announced` is the job that the worker was rung for: somebody is rung for it again where it is left to others.
    `shutdown` says whether this worker is to end: the trainer then checkpoints and the job goes back to the queue.
    """
    devices = device_locks(settings, card)
    try:
        deadline = time.monotonic() + settings.grace_seconds
        while not (held := devices.try_acquire()) and not shutdown() and time.monotonic() < deadline:
            # A trainer of an earlier worker may still be writing its last checkpoint.
            time.sleep(settings.poll_seconds)
        taken = _take(database, settings, card, announced, shutdown) if held else None
        if taken is not None:
            try:
                _Attempt(database, settings, card, taken, devices, shutdown).run()
            finally:
                taken.lock.release()
        elif not held:
            upkeep.announce_soon(database, settings, announced)
    finally:
        devices.release()
        # The trainer's own spans are there already; whoever looks at an attempt that has ended shall find it whole.
        tracing.flush()


@dataclass(frozen=True)
class _Taken:
    """A claimed job. Nobody else has its run directory, or `problem` says why that cannot be known."""

    job: Job
    lease: Lease
    lease_ends: float
    lock: Locks
    problem: OSError | None


def _take(
    database: Database, settings: Settings, card: Card, announced: str, shutdown: Callable[[], bool]
) -> _Taken | None:
    """The best job whose run directory no trainer has any more, waiting for such a one for the grace period."""
    deadline = time.monotonic() + settings.grace_seconds
    while not shutdown() and not workers.is_drained(database, card.name):
        found = schedule.candidates(database, card)
        for job in found:
            if taken := _try(database, settings, card, job, announced):
                return taken
        if not found:
            return None
        # A run directory may be in use for a little longer; what others have claimed meanwhile is no candidate now.
        if time.monotonic() > deadline:
            break
        time.sleep(settings.poll_seconds)
    upkeep.announce_soon(database, settings, announced)
    return None


def _try(database: Database, settings: Settings, card: Card, job: Job, announced: str) -> _Taken | None:
    lock, problem = run_lock(job.run_directory), None
    try:
        if not lock.try_acquire():
            return None
    except OSError as error:
        problem = error
    # Counted from before the question: the database counts from when it answers, which is later.
    lease_ends = time.monotonic() + settings.lease_seconds
    try:
        lease = leases.claim(database, settings, job.id, card.name, announced)
    except BaseException:
        lock.release()
        raise
    if lease is None:
        lock.release()
        return None
    return _Taken(job, lease, lease_ends, lock, problem)


class _Attempt:
    def __init__(
        self,
        database: Database,
        settings: Settings,
        card: Card,
        taken: _Taken,
        devices: Locks,
        shutdown: Callable[[], bool],
    ) -> None:
        self.database, self.settings, self.card = database, settings, card
        self.job, self.lease, self.lease_ends = taken.job, taken.lease, taken.lease_ends
        self.problem = taken.problem
        self.descriptors = [*devices.descriptors, *taken.lock.descriptors]
        self.shutdown = shutdown
        self.wishes = Wishes()
        self.offset = self.began = 0  # bytes of events.jsonl: read so far, and there before this attempt
        self.next_measurement = 0.0
        self.found: list[Event] = []  # what this attempt has reported so far

    def run(self) -> None:
        ids: dict[str, Any] = {"job_id": self.lease.job_id, "attempt": self.lease.fence}
        with logs.about(**ids, request_id=self.job.request_id), tracing.span("attempt", self.job.traceparent, **ids):
            self._run()

    def _run(self) -> None:
        try:
            outcome = self._train()
        except LeaseLost as error:
            log.warning("%s; its trainer is killed and nothing more is written", error)
            return
        except Exception as error:
            # Whatever it is, the job must not stay behind as running: it is told, and tried again.
            log.exception("the supervisor failed")
            message = f"the worker failed: {type(error).__name__}: {error}"
            outcome = Outcome("failed", None, {"code": "infrastructure", "message": message})
        self._finish(outcome)

    def _train(self) -> Outcome:
        """Start the trainer and stay with it to its end. Raises LeaseLost."""
        if self.problem is not None:
            raise self.problem
        rundir = prepare(self.job)
        rundir.vouch_until(self.lease_ends)
        try:
            made = self._make_inputs(rundir)
        except Unmade as error:
            return error.outcome
        if made is None:
            return Outcome("stopped")
        with contextlib.closing(made):
            return self._train_with(rundir, made)

    def _train_with(self, rundir: RunDir, made: Made) -> Outcome:
        self.wishes = self._patiently(lambda: leases.wishes(self.database, self.lease))
        retention.hold(rundir, self.wishes.held)
        self.began = rundir.events.stat().st_size if rundir.events.exists() else 0
        self.offset = self._patiently(lambda: reports.events_offset(self.database, self.lease, self.began))
        kernel_kills = out_of_memory_kills()
        orphans.adopt()
        descriptors = [*self.descriptors, *made.descriptors]
        trainer = start(rundir, self.settings, self.card, self.job, self.lease.fence, descriptors, made.granted)
        log.info("attempt %d begins, trainer %d", self.lease.fence, trainer.pid)
        # A thread knows nothing of the ids around it.
        watching = contextvars.copy_context()
        watchdog = threading.Thread(target=watching.run, args=(self._kill_without_lease, trainer), daemon=True)
        watchdog.start()
        try:
            killed = self._accompany(rundir, trainer)
            self._patiently(lambda: self._store_events(rundir))
            self._patiently(lambda: self._measure(rundir))
        finally:
            # Whatever went wrong here, no trainer is left behind without a supervisor.
            trainer.kill()
            if left := orphans.end(rundir.root):
                log.warning("%d processes of its trainer were left and are ended", left)
            # Whoever trains this directory by hand needs nobody to vouch for it.
            rundir.lease.unlink(missing_ok=True)
        if time.monotonic() > self.lease_ends:
            raise LeaseLost(self.lease.job_id, self.lease.fence)
        kernel_kills = out_of_memory_kills() - kernel_kills
        return outcome_of(rundir, trainer.kill(), self.found, killed, kernel_kills)

    def _make_inputs(self, rundir: RunDir) -> Made | None:
        """None if it is to stop before all are there.

        Raises LeaseLost and Unmade. It may take as long as a large model does, so the lease is renewed meanwhile.
        """
        needed = self._patiently(lambda: inputs.needs(self.database, self.job))
        environment = environment_of(self.settings, self.card, self.job, self.lease.fence)
        cancelled, next_beat = threading.Event(), 0.0
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(inputs.make, self.settings, rundir, needed, environment, cancelled)
            try:
                while not wait([made], self.settings.poll_seconds).done:
                    try:
                        if time.monotonic() >= next_beat:
                            self._beat(rundir)
                            next_beat = time.monotonic() + self.settings.beat_seconds
                        else:
                            self.wishes = leases.wishes(self.database, self.lease)
                    except DBAPIError as error:
                        log.warning("the database is away while the inputs are made: %s", error.orig)
                    if self._should_stop():
                        cancelled.set()
                return made.result()
            finally:
                cancelled.set()

    def _accompany(self, rundir: RunDir, trainer: Trainer) -> bool:
        """Until the trainer ends. True if it had to be killed because it did not stop when asked to."""
        next_beat, held = 0.0, self.wishes.held
        stop_asked: float | None = None
        while not trainer.ended:
            try:
                if time.monotonic() >= next_beat:
                    self._beat(rundir)
                    next_beat = time.monotonic() + self.settings.beat_seconds
                else:
                    self.wishes = leases.wishes(self.database, self.lease)
                held = self._hold(rundir, held)
                self._store_events(rundir)
                if time.monotonic() >= self.next_measurement:
                    self._measure(rundir)
            except DBAPIError as error:
                log.warning("the database is away; events wait in the run directory: %s", error.orig)
            if stop_asked is None and self._should_stop():
                _ask_to_stop(rundir, trainer)
                stop_asked = time.monotonic()
            if stop_asked is not None and time.monotonic() > stop_asked + self.settings.grace_seconds:
                log.warning("no step boundary within the grace period; the trainer is killed")
                trainer.kill()
                return True
            _sleep_until_exit(trainer, self.settings.poll_seconds)
        return False

    def _should_stop(self) -> bool:
        """Somebody wishes it, this worker ends, or the lease will be lost soon: time for a checkpoint is kept."""
        lease_ends_soon = time.monotonic() > self.lease_ends - self.settings.lease_seconds / 4
        return self.wishes.stop or lease_ends_soon or self.shutdown()

    def _beat(self, rundir: RunDir) -> None:
        asked = time.monotonic()
        self.wishes = leases.beat(self.database, self.settings, self.lease)
        self.lease_ends = asked + self.settings.lease_seconds
        try:
            # The trainer keeps time too, in case this process cannot: stopped, or without a processor.
            rundir.vouch_until(self.lease_ends)
        except OSError as error:
            log.warning("the trainer cannot be told of its lease, and will end with it: %s", error)

    def _hold(self, rundir: RunDir, held: frozenset[int]) -> frozenset[int]:
        """What the trainer has been told; `held` is what it was told before."""
        if self.wishes.held == held:
            return held
        try:
            retention.hold(rundir, self.wishes.held)
        except OSError as error:
            log.warning("the trainer cannot be told which checkpoints to hold: %s", error)
            return held
        return self.wishes.held

    def _store_events(self, rundir: RunDir) -> None:
        found, offset = read_from(rundir.events, self.offset)
        if offset > self.offset:
            reports.record(self.database, self.lease, found, offset)
            self.offset = offset
            # What an earlier attempt's trainer wrote when nobody read it any more says nothing about how this one ends.
            self.found += [event for end, event in found if end > self.began]

    def _measure(self, rundir: RunDir) -> None:
        self.next_measurement = time.monotonic() + _SECONDS_BETWEEN_MEASUREMENTS
        leases.measured(self.database, self.lease, _size(rundir))

    def _kill_without_lease(self, trainer: Trainer) -> None:
        """The deadline holds even while this worker waits for an answer of the database."""
        while not trainer.ended:
            if time.monotonic() > self.lease_ends:
                log.warning("the lease has run out; the trainer is killed")
                trainer.kill()
            time.sleep(min(0.5, self.settings.poll_seconds))

    def _finish(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            tracing.failed(outcome.error["code"])
        if outcome.kind == "succeeded":
            # The lease is not renewed meanwhile: a store that hangs must not cost it.
            results.make_early(self.database, self.settings, self.lease.job_id, self.lease.fence, self._spare_seconds)
        try:
            state = self._patiently(lambda: leases.finish(self.database, self.settings, self.lease, outcome))
        except LeaseLost as error:
            log.warning("%s; the outcome is not written", error)
            return
        log.info("attempt %d %s, the job is %s", self.lease.fence, outcome.kind, state)
        if state in TERMINAL:
            try:
                results.make_due(self.database, self.settings, self.lease.job_id)
            except (JobsError, DBAPIError) as error:
                log.warning("the result file is made later: %s", error)

    @property
    def _spare_seconds(self) -> float:
        return min(10.0, (self.lease_ends - time.monotonic()) / 3)

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


def _ask_to_stop(rundir: RunDir, trainer: Trainer) -> None:
    try:
        rundir.stop.touch()
    except OSError as error:
        log.warning("%s cannot be written (%s): the trainer is sent a signal instead", rundir.stop, error)
        trainer.ask_to_end()


def _size(rundir: RunDir) -> int:
    """Bytes of all files but exports, a cache that has its own limit; what disappears meanwhile has none."""
    total = 0
    for root, directories, names in os.walk(rundir.root):
        if root == str(rundir.root) and rundir.exports.name in directories:
            directories.remove(rundir.exports.name)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118  (a string is what walk gives)
    return total


def _sleep_until_exit(trainer: Trainer, seconds: float) -> None:
    """Sleep, but wake up when the trainer ends."""
    deadline = time.monotonic() + seconds
    while not trainer.ended and time.monotonic() < deadline:
        time.sleep(min(0.05, seconds))
