"""Who goes next, why a job waits, and who makes room. On SQLite and on PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from sqlalchemy import select, update

from jobs import keys, schedule, store, submission, upkeep, wishes, workers
from jobs import lease as leases
from jobs.database import Database
from jobs.errors import WorkerNotFound
from jobs.keys import Quotas, Scope
from jobs.lease import Lease, Outcome
from jobs.queue import queue_of, queues_of
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Job, Outbox
from jobs.workers import Card
from tests.conftest import job_body
from trainer.errors import SpecError

CPU = Card("cpu", "host", "0", (), 2)
GPUS = Card("gpus", "host", "0", ("0", "1", "2", "3"), 4)


def submit(
    database: Database, settings: Settings, devices: int = 1, device: str = "any", owner: str = "", priority: int = 0
) -> Job:
    resources = {"processes": devices, "device": device}
    body = job_body(resources=resources, optimisation={"global_batch": 8}, priority=priority)
    return submission.create(database, settings, JobRequest.model_validate(body), owner)


def order(database: Database, card: Card = CPU) -> list[str]:
    return [job.id for job in schedule.candidates(database, card)]


def run_on(database: Database, settings: Settings, job: Job, card: Card) -> Lease:
    workers.seen(database, card)
    lease = leases.claim(database, settings, job.id, card.name)
    assert lease is not None
    return lease


def owner_of(database: Database) -> str:
    return keys.create(database, "o", [Scope.WRITE], Quotas())[0].id


def test_higher_priority_first_then_the_longest_queued(database: Database, settings: Settings) -> None:
    low, first, second, high = (submit(database, settings, priority=p).id for p in (-1, 0, 0, 7))
    assert order(database) == [high, first, second, low]


def test_a_hundred_jobs_of_one_owner_do_not_keep_out_the_one_of_another(database: Database, settings: Settings) -> None:
    many, few = owner_of(database), owner_of(database)
    theirs = [submit(database, settings, owner=many) for _ in range(3)]
    mine = submit(database, settings, owner=few)
    assert order(database)[0] == theirs[0].id
    run_on(database, settings, theirs[0], CPU)
    assert order(database) == [mine.id, theirs[1].id, theirs[2].id]


def test_jobs_of_an_owner_at_its_limit_hide_nobody_else_s(database: Database, settings: Settings) -> None:
    greedy = keys.create(database, "o", [Scope.WRITE], Quotas(running=0))[0].id
    for _ in range(25):
        submit(database, settings, owner=greedy, priority=9)
    mine = submit(database, settings)
    assert order(database) == [mine.id]


def test_a_worker_is_offered_what_fits_it(database: Database, settings: Settings) -> None:
    any_two, gpu, cpu, any_four = (
        submit(database, settings, devices, device).id
        for devices, device in ((2, "any"), (1, "gpu"), (1, "cpu"), (4, "any"))
    )
    assert order(database, CPU) == [any_two, cpu]
    assert order(database, GPUS) == [any_two, gpu, any_four]


def test_a_worker_listens_to_the_queues_of_all_jobs_that_fit_it(settings: Settings) -> None:
    heard = queues_of(settings, CPU)
    assert queue_of(settings, "any", 2) in heard
    assert queue_of(settings, "cpu", 1) in heard
    assert queue_of(settings, "any", 3) not in heard
    assert queue_of(settings, "gpu", 1) not in heard


def test_a_job_that_fits_nowhere_says_so(database: Database, settings: Settings) -> None:
    job = submit(database, settings, 4, "gpu")

    def why() -> tuple[bool, str]:
        waiting = schedule.waiting(database, settings, store.get(database, job.id))
        assert waiting is not None
        return waiting.unschedulable, waiting.reason

    assert why() == (True, "it needs 4 gpu devices of one worker; no worker is up")
    workers.seen(database, CPU)
    assert why() == (True, "it needs 4 gpu devices of one worker; no worker that is up has any")
    workers.seen(database, Card("small", "host", "0", ("0", "1"), 2))
    assert why() == (True, "it needs 4 gpu devices of one worker; the largest that is up, small, has 2")
    workers.seen(database, GPUS)
    assert why() == (False, "0 jobs are before it in the queue")
    workers.drain(database, GPUS.name, stop_job=False)
    assert why() == (False, "every worker that fits is drained")
    workers.left(database, GPUS.name)
    assert why()[0]
    run_elsewhere = submit(database, settings)
    run_on(database, settings, run_elsewhere, CPU)
    assert schedule.waiting(database, settings, store.get(database, run_elsewhere.id)) is None


def test_a_job_that_no_installation_like_this_will_take_is_refused(database: Database, settings: Settings) -> None:
    small = settings.model_copy(update={"largest_job": 2})
    submit(database, small, 2)
    with pytest.raises(SpecError, match=r"^resources.processes: 4 devices, but jobs here may have 2"):
        submit(database, small, 4)


def test_who_takes_another_job_than_the_announced_one_has_that_one_announced_again(
    database: Database, settings: Settings
) -> None:
    announced, better = submit(database, settings), submit(database, settings, priority=5)
    upkeep.publish_due(database, settings, lambda *_: None)
    workers.seen(database, CPU)
    assert leases.claim(database, settings, better.id, CPU.name, announced.id) is not None
    with database.reading() as session:
        assert session.scalars(select(Outbox.job_id)).all() == [announced.id]


def test_workers_that_take_one_another_s_jobs_do_not_wait_for_each_other(
    database: Database, settings: Settings
) -> None:
    """Each holds the job that it claims, and announces the other's again."""
    cards = [Card(f"w{n}", "host", "0", (), 1) for n in range(2)]
    for card in cards:
        workers.seen(database, card)
    for _ in range(10):
        jobs = [submit(database, settings).id for _ in range(2)]
        together = Barrier(2)

        def take(number: int, jobs: list[str] = jobs, together: Barrier = together) -> Lease | None:
            together.wait()
            return leases.claim(database, settings, jobs[number], cards[number].name, jobs[1 - number])

        with ThreadPoolExecutor(2) as pool:
            assert None not in list(pool.map(take, range(2)))


def test_jobs_of_a_queue_that_nobody_hears_hide_no_forgotten_ones(database: Database, settings: Settings) -> None:
    for _ in range(101):
        submit(database, settings, devices=8)
    mine = submit(database, settings)
    upkeep.publish_due(database, settings, lambda *_: None)
    upkeep.publish_due(database, settings, lambda *_: None)
    with database.transaction() as session:
        session.execute(update(Job).values(queued_at=Job.queued_at - 1e6, announced_at=2.0))
    assert upkeep.announce_again(database, settings, {"stiefel.any.8": 101}) == 1
    with database.reading() as session:
        assert session.scalars(select(Outbox.job_id)).all() == [mine.id]


def test_when_a_job_of_a_full_owner_ends_one_of_each_size_is_announced(database: Database, settings: Settings) -> None:
    owner = keys.create(database, "o", [Scope.WRITE], Quotas(running=1))[0].id
    first, large, small = (submit(database, settings, devices, owner=owner) for devices in (1, 8, 1))
    lease = run_on(database, settings, first, CPU)
    upkeep.publish_due(database, settings, lambda *_: None)
    leases.finish(database, settings, lease, Outcome("succeeded", 0))
    with database.reading() as session:
        assert set(session.scalars(select(Outbox.job_id))) == {large.id, small.id}


# -------------------------------------------------------------------------------------------------------- preemption


def test_jobs_that_cannot_start_anyway_neither_preempt_nor_hide_those_that_can(
    database: Database, settings: Settings
) -> None:
    run_on(database, settings, submit(database, settings), CPU)
    greedy = keys.create(database, "o", [Scope.WRITE], Quotas(running=0))[0].id
    for _ in range(25):
        submit(database, settings, owner=greedy, priority=50)
        submit(database, settings, devices=8, priority=50)
    assert schedule.preempt(database, settings) == 0
    submit(database, settings, priority=10)
    assert schedule.preempt(database, settings) == 1


def test_a_job_of_lower_priority_makes_room_and_spends_no_attempt(database: Database, settings: Settings) -> None:
    low = submit(database, settings, priority=0)
    lease = run_on(database, settings, low, CPU)
    assert schedule.preempt(database, settings) == 0
    submit(database, settings, priority=0)
    assert schedule.preempt(database, settings) == 0  # of the same priority: it waits
    high = submit(database, settings, priority=1)
    assert schedule.preempt(database, settings) == 1
    assert schedule.preempt(database, settings) == 0  # it is asked once
    assert leases.beat(database, settings, lease).preempt
    assert leases.finish(database, settings, lease, Outcome("stopped", 0)) == State.QUEUED
    after = store.get(database, low.id)
    assert (after.failures, after.preempt_requested_at) == (0, None)
    assert order(database)[0] == high.id


def test_nobody_makes_room_while_a_worker_that_fits_is_idle(database: Database, settings: Settings) -> None:
    run_on(database, settings, submit(database, settings), CPU)
    workers.seen(database, GPUS)
    submit(database, settings, priority=1)
    assert schedule.preempt(database, settings) == 0
    # One idle worker serves one job.
    submit(database, settings, priority=1)
    assert schedule.preempt(database, settings) == 1


def test_the_lowest_makes_room_and_of_equal_ones_the_youngest(database: Database, settings: Settings) -> None:
    cards = [Card(f"w{n}", "host", "0", (), 1) for n in range(3)]
    jobs = [submit(database, settings, priority=p) for p in (1, 0, 0)]
    for job, card in zip(jobs, cards, strict=True):
        run_on(database, settings, job, card)
    submit(database, settings, priority=9)
    assert schedule.preempt(database, settings) == 1
    asked = [store.get(database, job.id).preempt_requested_at is not None for job in jobs]
    assert asked == [False, False, True]


def test_room_on_a_worker_that_does_not_fit_is_no_room(database: Database, settings: Settings) -> None:
    run_on(database, settings, submit(database, settings), CPU)
    submit(database, settings, 4, "gpu", priority=9)
    assert schedule.preempt(database, settings) == 0


# ------------------------------------------------------------------------------------------------------------- drain


def test_a_drained_worker_claims_nothing_until_it_is_undrained(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    assert workers.seen(database, CPU) is False
    workers.drain(database, CPU.name, stop_job=False)
    workers.drain(database, CPU.name, stop_job=False)
    assert workers.seen(database, CPU) is True
    assert leases.claim(database, settings, job.id, CPU.name) is None
    workers.undrain(database, CPU.name)
    assert leases.claim(database, settings, job.id, CPU.name) is not None
    with pytest.raises(WorkerNotFound):
        workers.drain(database, "nobody", stop_job=False)


def test_draining_can_send_the_worker_s_job_elsewhere(database: Database, settings: Settings) -> None:
    lease = run_on(database, settings, submit(database, settings), CPU)
    workers.drain(database, CPU.name, stop_job=False)
    assert not leases.beat(database, settings, lease).stop
    workers.drain(database, CPU.name, stop_job=True)
    assert leases.beat(database, settings, lease).preempt
    assert leases.finish(database, settings, lease, Outcome("stopped", 0)) == State.QUEUED


def test_workers_say_what_they_have_and_do(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    run_on(database, settings, job, CPU)
    workers.seen(database, GPUS)
    workers.left(database, GPUS.name)
    found = {seen.worker.name: (seen.up, seen.job_id) for seen in workers.list_workers(database, settings)}
    assert found == {"cpu": (True, job.id), "gpus": (False, None)}
    assert workers.forget(database) == 0


def test_a_wish_beats_preemption(database: Database, settings: Settings) -> None:
    job = submit(database, settings)
    lease = run_on(database, settings, job, CPU)
    submit(database, settings, priority=1)
    schedule.preempt(database, settings)
    wishes.cancel(database, settings, job.id)
    assert leases.finish(database, settings, lease, Outcome("stopped", 0)) == State.CANCELLED


def test_a_job_is_startable_where_an_idle_worker_could_take_it_now(database: Database, settings: Settings) -> None:
    def startable() -> int:
        with database.reading() as session:
            return schedule.startable(session, settings)

    waiting = submit(database, settings)
    submit(database, settings, device="gpu")
    submit(database, settings, devices=4)
    at_limit = keys.create(database, "o", [Scope.WRITE], Quotas(running=0))[0].id
    submit(database, settings, owner=at_limit)
    held_back = submit(database, settings)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == held_back.id).values(not_before=2e9 * 2))
    assert startable() == 0, "no worker is there"
    workers.seen(database, CPU)
    assert startable() == 1
    workers.drain(database, CPU.name, stop_job=False)
    assert startable() == 0, "it is drained"
    workers.undrain(database, CPU.name)
    run_on(database, settings, waiting, CPU)
    submit(database, settings)
    assert startable() == 0, "it is busy"
