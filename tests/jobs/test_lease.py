"""The right to run a job: one at a time, and void once lost. On SQLite and on PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from jobs import fleet, reports, store, submission, upkeep, wishes
from jobs import lease as leases
from jobs.database import Database
from jobs.errors import LeaseLost
from jobs.lease import Lease, Outcome
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job, Outbox, Point
from tests.conftest import job_body
from trainer import events

FAILURE = {"code": "unknown", "message": "it broke"}


def submit(database: Database, settings: Settings) -> Job:
    return submission.create(database, settings, JobRequest.model_validate(job_body()))


def claim(database: Database, settings: Settings, job: Job, worker: str = "w") -> Lease:
    lease = leases.claim(database, settings, job.id, worker)
    assert lease is not None
    return lease


def expire(database: Database, job: Job) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=1.0))


def step(number: int, loss: float) -> events.Step:
    return events.Step(
        step=number,
        loss=loss,
        learning_rate=0.1,
        gradient_norm=1.0,
        tokens=number * 10,
        seconds=0.5,
        projection_seconds=0.0,
        tokens_per_second=20.0,
        peak_device_bytes=None,
        peak_host_bytes=1,
    )


def record(database: Database, lease: Lease, found: list[events.Event], offset: int) -> None:
    """As if the lines of `found` were the last ones before `offset`."""
    reports.record(database, lease, [(offset, event) for event in found], offset)


def started(number: int) -> events.Started:
    return events.Started(
        step=number,
        steps=20,
        processes=1,
        device="cpu",
        parameters=1,
        trained_parameters=1,
        optimizer_state_bytes=1,
        full_adamw_state_bytes=2,
        tokens_per_step=10,
        training_tokens=100,
    )


def test_two_workers_cannot_claim_one_job(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: leases.claim(database, settings, job.id, f"w{n}"), range(8)))
    assert sum(lease is not None for lease in won) == 1


def test_a_lease_that_ran_out_is_void_once_the_job_is_queued_again(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    old = claim(database, settings, job)
    expire(database, job)
    assert leases.claim(database, settings, job.id, "other") is None  # the reaper counts the loss first
    upkeep.requeue_lost(database, settings)
    new = claim(database, settings, job, "other")
    assert new.fence > old.fence
    with pytest.raises(LeaseLost):
        leases.beat(database, settings, old)
    with pytest.raises(LeaseLost):
        record(database, old, [step(1, 9.0)], 100)
    with pytest.raises(LeaseLost):
        leases.finish(database, settings, old, Outcome("succeeded", 0))
    assert store.points(database, job.id).items == []
    assert [a.outcome for a in store.attempts(database, job.id)] == ["lost", None]
    seen = store.get(database, job.id)
    assert (seen.failures, seen.losses) == (0, 1)  # a lost worker is no failure of the training


def test_a_batch_given_twice_is_stored_once(database: Database, settings: Settings) -> None:
    """As after a commit whose answer was lost."""
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0)], 10)
    for _ in range(2):
        reports.record(database, lease, [(20, step(1, 3.0)), (30, step(2, 2.0))], 30)
    seen = store.get(database, job.id)
    assert (seen.events_offset, seen.figures["tokens_total"], seen.figures["step_seconds_total"]) == (30, 20, 1.0)
    assert [e.type for e in store.events(database, job.id).items].count("started") == 1


def test_tokens_in_total_never_go_down(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0), *(step(n, 1.0) for n in range(1, 5))], 1)
    record(database, lease, [started(2), step(3, 1.0)], 2)
    figures = store.get(database, job.id).figures
    assert (figures["tokens"], figures["tokens_total"]) == (30, 50)


def test_events_and_their_offset_are_stored_together(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0), step(1, 3.0), step(2, 2.0)], 512)
    assert reports.events_offset(database, lease, 10**6) == 512
    seen = store.get(database, job.id)
    assert (seen.step, seen.figures["loss"]) == (2, 2.0)


def test_a_resumed_attempt_replaces_what_lay_behind_its_checkpoint(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [started(0), *(step(n, float(n)) for n in range(1, 6))], 1)
    record(database, lease, [started(3), step(4, 44.0)], 2)
    points = store.points(database, job.id).items
    assert [(p.step, p.loss) for p in points] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 44.0)]


def test_a_worker_that_shuts_down_costs_no_attempt(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    for _ in range(settings.max_attempts + 2):
        lease = claim(database, settings, job)
        assert leases.finish(database, settings, lease, Outcome("stopped", 0)) == State.QUEUED
    assert store.get(database, job.id).failures == 0


@pytest.mark.parametrize("kind", ["stopped", "failed"])
def test_cancelling_a_running_job_is_a_wish_that_its_end_fulfils(
    database: Database, settings: Settings, kind: str
) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    assert wishes.cancel(database, settings, job.id).state == State.RUNNING
    assert leases.beat(database, settings, lease).cancel
    assert leases.finish(database, settings, lease, Outcome(kind, 0, None)) == State.CANCELLED


def test_a_job_that_finishes_before_it_hears_of_the_wish_has_succeeded(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    wishes.cancel(database, settings, job.id)
    assert leases.finish(database, settings, lease, Outcome("succeeded", 0)) == State.SUCCEEDED


def test_pause_and_resume(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    wishes.pause(database, job.id)
    assert leases.finish(database, settings, lease, Outcome("stopped", 0)) == State.PAUSED
    assert leases.claim(database, settings, job.id, "w") is None
    assert wishes.resume(database, job.id).state == State.QUEUED
    assert leases.claim(database, settings, job.id, "w") is not None


@pytest.mark.parametrize("end", ["killed", "lost"])
def test_a_wish_to_pause_outlives_an_attempt_that_ends_badly(database: Database, settings: Settings, end: str) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    wishes.pause(database, job.id)
    if end == "killed":
        leases.finish(database, settings, lease, Outcome("failed", -9, FAILURE))
    else:
        expire(database, job)
        upkeep.requeue_lost(database, settings)
    assert store.get(database, job.id).state == State.PAUSED


def test_two_jobs_may_end_at_the_same_moment(database: Database, settings: Settings) -> None:
    """Both are the first to count an end like theirs."""
    jobs = [submit(database, settings) for _ in range(6)]
    held = [claim(database, settings, job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda lease: leases.finish(database, settings, lease, Outcome("succeeded", 0)), held))
    assert done == [State.SUCCEEDED] * 6
    finished = [c.value for c in fleet.snapshot(database, settings).counters if c.name == "jobs_finished"]
    assert finished == [6]


def test_a_published_row_s_id_never_comes_again(database: Database, settings: Settings) -> None:
    """Else a publisher that is slow to delete would delete the announcement of another job."""
    submit(database, settings)
    with database.reading() as session:
        first = session.scalars(select(Outbox.id)).one()
    upkeep.publish_due(database, settings, lambda *_: None)
    submit(database, settings)
    with database.reading() as session:
        assert session.scalars(select(Outbox.id)).one() > first


def test_a_lost_worker_s_job_is_queued_again_and_announced(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    upkeep.publish_due(database, settings, lambda *_: None)
    lease = claim(database, settings, job)
    assert upkeep.requeue_lost(database, settings) == 0
    expire(database, job)
    assert upkeep.requeue_lost(database, settings) == 1
    assert store.get(database, job.id).state == State.QUEUED
    announced: list[str] = []
    upkeep.publish_due(database, settings, lambda _, job_id: announced.append(job_id))
    assert announced == [job.id]
    with pytest.raises(LeaseLost):
        leases.beat(database, settings, lease)


def test_an_announcement_stays_until_the_broker_has_it(database: Database, settings: Settings) -> None:
    job = submit(database, settings)

    def broken(*_: str) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        upkeep.publish_due(database, settings, broken)
    published: list[str] = []
    upkeep.publish_due(database, settings, lambda _, job_id: published.append(job_id))
    upkeep.publish_due(database, settings, lambda _, job_id: published.append(job_id))
    assert published == [job.id]


def test_an_announcement_of_a_deleted_job_is_dropped(database: Database, settings: Settings) -> None:
    with database.transaction() as session:
        session.add(Outbox(job_id="job-deleted", due_at=1.0))
    published: list[str] = []
    upkeep.publish_due(database, settings, lambda _, job_id: published.append(job_id))
    assert published == []
    with database.reading() as session:
        assert session.scalars(select(Outbox)).all() == []


def test_a_forgotten_job_is_announced_again_but_not_while_workers_are_merely_busy(
    database: Database, settings: Settings
) -> None:
    job = submit(database, settings)
    upkeep.publish_due(database, settings, lambda *_: None)
    with database.transaction() as session:
        session.execute(update(Job).values(queued_at=1.0, announced_at=2.0))
    assert upkeep.announce_again(database, settings, {"stiefel.any.1": 1}) == 0
    assert upkeep.announce_again(database, settings, {"stiefel.any.1": 0}) == 1
    assert upkeep.announce_again(database, settings, {"stiefel.any.1": 0}) == 0  # it is in the outbox already
    with database.reading() as session:
        assert session.scalars(select(Outbox.job_id)).all() == [job.id]


def test_points_can_be_paged_and_thinned(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = claim(database, settings, job)
    record(database, lease, [step(n, 1.0) for n in range(1, 101)], 1)
    page = store.points(database, job.id, after=10, limit=5)
    assert [p.step for p in page.items] == [11, 12, 13, 14, 15]
    assert page.has_more
    thin = store.points(database, job.id, thin_to=9)
    assert [p.step for p in thin.items] == [12, 24, 36, 48, 60, 72, 84, 96, 100]


def test_the_database_refuses_points_of_an_unknown_job(database: Database) -> None:
    from sqlalchemy.exc import IntegrityError

    with pytest.raises(IntegrityError), database.transaction() as session:
        session.add(Point(job_id="job-none", **step(1, 1.0).model_dump(exclude={"type"})))


def test_a_batch_with_a_second_start_in_it_keeps_what_came_of_both(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    told = [started(0), *(step(number, 1.0) for number in range(1, 6)), step(5, 2.0), started(2), step(3, 0.5)]
    record(database, claim(database, settings, job), told, 1)
    assert [(point.step, point.loss) for point in store.points(database, job.id).items] == [
        (1, 1.0),
        (2, 1.0),
        (3, 0.5),
    ]
    assert store.get(database, job.id).step == 3
