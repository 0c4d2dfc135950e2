"""The result file of a fine-tuning: its curve as a table that any program reads, among its owner's files.

A worker stores it before it says that its job has succeeded, so that whoever hears of the one finds the other; the
transaction that ends the job attaches it. Where there is none then, of a job that failed or was cancelled after some
steps, or because the store was away, the job notes that one is due, and its worker or an API process makes it.

However many try, a job gets one: what is attached is decided under the job's row, and who was too late removes theirs.
"""

import logging
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from sqlalchemy import Select, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from jobs import files, store
from jobs.database import Database, clock, now
from jobs.errors import FileUnknown, JobsError
from jobs.files import NewFile, Status
from jobs.filestore import Incoming
from jobs.settings import Settings
from jobs.tables import Evaluation, Job, Point, StoredFile

log = logging.getLogger("stiefel.results")

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy", "learning_rate")
_AT_ONCE = 1000  # points
# The worker that has ended a job makes its results; others take over where that did not happen.
_GRACE_SECONDS = 60.0
# Somebody is at it, or it has failed: the next try is not before.
_HELD_SECONDS = 600.0


def lines(points: Iterable[Point], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Of CSV, with their ends: one a step, in order; an evaluation in the line of its step.

    What is not known is empty; numbers are as exact as they are stored.
    """
    yield ",".join(COLUMNS) + "\n"
    left = list(evaluations)
    for point in points:
        while left and left[0].step < point.step:  # such as the one before the first step
            yield _line(left[0].step, None, left.pop(0))
        yield _line(point.step, point, left.pop(0) if left and left[0].step == point.step else None)
    for evaluation in left:
        yield _line(evaluation.step, None, evaluation)


def make(database: Database, settings: Settings, job: Job) -> StoredFile:
    """∅ → a file of the job's present attempt, which is not attached to it. Raises JobsError."""
    for number, old in _made(database, job):  # by somebody who did not get as far as attaching it
        if number <= job.fence:
            files.remove(database, settings, old)
    with Incoming(settings) as incoming:
        for line in lines(_points(database, job.id), store.evaluations(database, job.id)):
            incoming.write(line.encode())
        new = NewFile(job.owner, _filename(job, job.fence), files.RESULTS, Status.PROCESSED)
        return files.create(database, settings, new, incoming)


def make_early(database: Database, settings: Settings, job_id: str, fence: int, seconds: float) -> None:
    """Before the attempt says that its job has succeeded, so that the result is there when the job is.

    What is not done after so many seconds, or fails, is made later.
    """
    too_late = threading.Event()

    def work() -> None:
        try:
            job = store.get(database, job_id)
            if job.tuning is None or job.fence != fence:
                return
            made = make(database, settings, job)
            if too_late.is_set():
                files.remove(database, settings, made.id)
        except (JobsError, SQLAlchemyError) as error:
            log.warning("the result file of %s is made later: %s", job_id, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    too_late.set()


def attach(session: Session, job: Job) -> None:
    """The job ends, in this transaction: its result file is what this attempt has made early, or it is due."""
    if job.tuning is None or job.step == 0:
        return
    early = session.scalars(_of(job).where(StoredFile.filename == _filename(job, job.fence))).first()
    if early is not None:
        _attach(job, early)
    else:
        job.results_due_at = clock(session) + _GRACE_SECONDS


def make_due(database: Database, settings: Settings, job_id: str | None = None) -> bool:
    """Of one job, the one given or any whose worker has not made it; whether there was one. Raises JobsError."""
    due = select(Job).where(Job.results_due_at.is_not(None))
    due = due.where(Job.results_due_at <= now()) if job_id is None else due.where(Job.id == job_id)
    due = due.order_by(Job.results_due_at).limit(1)
    with database.reading() as session:
        if session.scalar(due) is None:
            return False
    with database.transaction() as session:
        job = session.scalar(due.with_for_update(skip_locked=True))
        if job is None:
            return False
        held = job.results_due_at = clock(session) + _HELD_SECONDS
    made = make(database, settings, job)
    with database.transaction() as session:
        found = session.scalar(select(Job).where(Job.id == job.id).with_for_update())
        if found is not None and found.results_due_at == held:
            _attach(found, made.id)
            return True
    # It took so long that somebody else has begun, and may have removed it, or the job was deleted.
    with suppress(FileUnknown):
        files.remove(database, settings, made.id)
    return True


class Maker:
    """Makes what is due, from `start` to `close`: in API processes, which reach the files' store as workers do."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="results", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(self._settings.upkeep_seconds):
            try:
                while not self._stop.is_set() and make_due(self._database, self._settings):
                    pass
            except (JobsError, SQLAlchemyError) as error:
                log.warning("a result file is made later: %s", error)


def _attach(job: Job, file_id: str) -> None:
    assert job.tuning is not None
    job.tuning = job.tuning | {"result_files": [file_id]}  # a new one: what is changed inside is not noticed
    job.results_due_at = None


def _of(job: Job) -> Select[str]:
    """Ids of its owner's result files."""
    query = select(StoredFile.id).where(StoredFile.owner == job.owner, StoredFile.purpose == files.RESULTS)
    return query.where(StoredFile.created_at >= job.created_at, StoredFile.status == Status.PROCESSED)


def _made(database: Database, job: Job) -> list[tuple[int, str]]:
    """(attempt, id) of the files that were made of the job's results and are not attached."""
    name = re.compile(re.escape(_filename(job, 0)).replace(r"\-0\.", r"\-(\d+)\."))
    with database.reading() as session:
        named = session.execute(_of(job).add_columns(StoredFile.filename)).all()
    found = [(name.fullmatch(filename), file_id) for file_id, filename in named]
    attached = (job.tuning or {}).get("result_files", [])
    return [(int(match[1]), file_id) for match, file_id in found if match and file_id not in attached]


def _filename(job: Job, fence: int) -> str:
    return f"ftjob-{job.id.removeprefix('job-')}-results-{fence}.csv"


def _points(database: Database, job_id: str) -> Iterator[Point]:
    """A page at a time: a run of a million steps is not held."""
    after, more = 0, True
    while more:
        page = store.points(database, job_id, after, _AT_ONCE)
        yield from page.items
        more = page.has_more
        after = page.items[-1].step if page.items else after


def _line(step: int, point: Point | None, evaluation: Evaluation | None) -> str:
    values = (
        step,
        point and point.loss,
        point and point.accuracy,
        evaluation and evaluation.loss,
        evaluation and evaluation.accuracy,
        point and point.learning_rate,
    )
    return ",".join("" if value is None else repr(value) for value in values) + "\n"
