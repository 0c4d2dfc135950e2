"""What becomes of attempts that fail: which are repeated, when, and how often. On SQLite and on PostgreSQL."""

import pytest
from sqlalchemy import update

from jobs import failures, reports, store, submission, upkeep
from jobs import lease as leases
from jobs.database import Database
from jobs.lease import Outcome
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job
from tests.conftest import job_body
from tests.jobs.test_lease import claim, expire, record, started, step
from trainer import errors, events


def submit(database: Database, settings: Settings, **retry: object) -> Job:
    return submission.create(database, settings, JobRequest.model_validate(job_body(retry=retry)))


def fail(database: Database, settings: Settings, job: Job, code: str = "unknown") -> State:
    """Once more, the backoff having passed."""
    let_backoff_pass(database)
    lease = claim(database, settings, job)
    return leases.finish(database, settings, lease, Outcome("failed", 1, {"code": code, "message": "it broke"}))


def let_backoff_pass(database: Database) -> None:
    with database.transaction() as session:
        session.execute(update(Job).values(not_before=0.0))


def test_a_failure_is_repeated_until_the_attempts_are_used_up(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    states = [fail(database, settings, job) for _ in range(settings.max_attempts)]
    assert states == [State.QUEUED, State.QUEUED, State.FAILED]
    ended = store.get(database, job.id)
    assert ended.error == {"code": "unknown", "message": "it broke"}
    assert ended.finished_at is not None
    repeated = [attempt.retry_at is not None for attempt in store.attempts(database, job.id)]
    assert repeated == [True, True, False]


def test_a_job_says_how_often_and_after_what_it_is_repeated(database: Database, settings: Settings) -> None:
    job = submit(database, settings, max_attempts=2, on=["divergence"])
    assert fail(database, settings, job, "divergence") == State.QUEUED
    assert fail(database, settings, job, "divergence") == State.FAILED
    other = submit(database, settings, on=["divergence"])
    assert fail(database, settings, other, "unknown") == State.FAILED


@pytest.mark.parametrize("code", sorted(set(failures.MEANINGS) - set(failures.RETRIED_BY_DEFAULT)))
def test_a_failure_that_would_happen_again_is_final(database: Database, settings: Settings, code: str) -> None:
    assert fail(database, settings, submit(database, settings), code) == State.FAILED


def test_backoff_doubles_and_keeps_the_job_from_being_claimed(database: Database, settings: Settings) -> None:
    job = submit(database, settings, backoff_seconds=100)
    waits = []
    for _ in range(2):
        fail(database, settings, job)
        seen = store.get(database, job.id)
        waits.append(round(seen.not_before - seen.queued_at))
        assert leases.claim(database, settings, job.id, "w") is None
    assert waits == [100, 200]
    assert failures.backoff(5, 1000) == 3600


def test_a_new_checkpoint_ends_the_row_of_failures(database: Database, settings: Settings) -> None:
    """A run of weeks may fail more often than a run of hours."""
    job = submit(database, settings)
    for round_ in range(1, 6):
        let_backoff_pass(database)
        lease = claim(database, settings, job)
        saved = events.Checkpointed(step=round_, path="/c", bytes=1, seconds=1.0)
        record(database, lease, [started(round_ - 1), step(round_, 1.0), saved], round_)
        outcome = Outcome("failed", 1, {"code": "killed", "message": ""})
        assert leases.finish(database, settings, lease, outcome) == State.QUEUED
    assert store.get(database, job.id).failures == 1


def test_getting_on_again_from_an_older_checkpoint_is_progress_too(database: Database, settings: Settings) -> None:
    """The newest was damaged, or gone back from."""
    job = submit(database, settings)
    for first in (0, 4, 2, 3):
        let_backoff_pass(database)
        lease = claim(database, settings, job)
        saved = events.Checkpointed(step=first + 1, path="/c", bytes=1, seconds=1.0)
        record(database, lease, [started(first), saved], store.get(database, job.id).events_offset + 1)
        outcome = Outcome("failed", 1, {"code": "killed", "message": ""})
        assert leases.finish(database, settings, lease, outcome) == State.QUEUED
    assert store.get(database, job.id).failures == 1


def test_a_lost_attempt_s_device_time_is_counted_to_the_end_of_its_lease(
    database: Database, settings: Settings
) -> None:
    job = submit(database, settings)
    claim(database, settings, job)
    with database.transaction() as session:  # claimed 100 s ago, and lost 40 s ago
        changed = {"charged_until": Job.charged_until - 100, "lease_expires_at": Job.charged_until - 40}
        session.execute(update(Job).values(**changed))
    upkeep.requeue_lost(database, settings)
    assert store.get(database, job.id).device_seconds == pytest.approx(60, abs=1)


def test_lost_workers_spend_no_attempt_but_a_job_that_takes_them_down_is_given_up(
    database: Database, settings: Settings
) -> None:
    job = submit(database, settings)
    for _ in range(settings.max_losses):
        assert store.get(database, job.id).state == State.QUEUED
        let_backoff_pass(database)
        claim(database, settings, job)
        expire(database, job)
        upkeep.requeue_lost(database, settings)
    ended = store.get(database, job.id)
    assert ended.state == State.FAILED
    assert (ended.failures, ended.losses) == (0, settings.max_losses)
    assert ended.error is not None
    assert ended.error["code"] == "infrastructure"


def test_every_name_of_the_trainer_is_a_class(database: Database) -> None:
    for leaf in (errors.TrainerError, *errors.LEAVES):
        assert failures.class_of(leaf.name) in failures.MEANINGS
    renamed = {leaf.name: failures.class_of(leaf.name) for leaf in errors.LEAVES if leaf.name not in failures.MEANINGS}
    assert renamed == {"host_gone": "infrastructure", "rolled_back": "killed"}
    assert failures.class_of("of a later version") == "unknown"


def test_an_events_file_that_lost_its_end_is_read_from_its_new_one(database: Database, settings: Settings) -> None:
    """A power cut takes what was not yet on disk, although it was read before."""
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0), step(1, 1.0), step(2, 2.0)], 500)
    assert reports.events_offset(database, lease, size=300) == 300
    record(database, lease, [started(1), step(2, 2.5)], 400)
    assert [(p.step, p.loss) for p in store.points(database, job.id).items] == [(1, 1.0), (2, 2.5)]
    assert store.get(database, job.id).events_offset == 400
