"""Result files: the numbers of the store, once for each job that has ended. On SQLite and on PostgreSQL."""

import csv
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import select, update

from api.main import create_app
from jobs import files, filestore, reports, results, store, upkeep, wishes
from jobs import lease as leases
from jobs.database import Database, now
from jobs.errors import StoreAway
from jobs.lease import Lease, Outcome
from jobs.results import Maker
from jobs.settings import Settings
from jobs.tables import Evaluation, Job, Point, StoredFile
from tests.api.inprocess import served
from tests.jobs.test_lease import started, step
from tests.jobs.test_webhooks import claimed, submit
from trainer import events

SUCCEEDED = Outcome("succeeded", 0)
BROKEN = Outcome("failed", 1, {"code": "bad_data", "message": "none"})


def trained(database: Database, settings: Settings, steps: int = 3, tuned: bool = True) -> Lease:
    """A job that runs, and has got so far."""
    lease = claimed(database, settings, tuned)
    found: list[events.Event] = [started(0), evaluated(0, 0.0)]
    for number in range(1, steps + 1):
        found.append(step(number, 1 / (3 * number)).model_copy(update={"accuracy": 0.1 * number}))
    found.append(evaluated(steps, 0.7))
    reports.record(database, lease, list(enumerate(found, start=1)), len(found))
    return lease


def evaluated(number: int, accuracy: float) -> events.Evaluated:
    return events.Evaluated(step=number, loss=1 / 7, perplexity=2.0, sequences=1, seconds=0.1, accuracy=accuracy)


def stored(database: Database) -> list[StoredFile]:
    with database.reading() as session:
        return list(session.scalars(select(StoredFile).where(StoredFile.status == "processed")))


def attached(database: Database, job_id: str) -> list[str]:
    tuning = store.get(database, job_id).tuning
    assert tuning is not None
    return list(tuning.get("result_files", []))


def text(settings: Settings, file: StoredFile) -> str:
    return b"".join(filestore.pieces(settings, file)).decode()


def finish_early(database: Database, settings: Settings, lease: Lease) -> None:
    """As a worker does."""
    results.make_early(database, settings, lease.job_id, lease.fence, 20.0)
    leases.finish(database, settings, lease, SUCCEEDED)


def due_now(database: Database) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.results_due_at.is_not(None)).values(results_due_at=now()))


def test_what_the_openai_client_downloads_is_what_the_store_holds(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_AT_ONCE", 20)
    lease = trained(database, settings, steps=70)  # several pages
    finish_early(database, settings, lease)
    [file_id] = attached(database, lease.job_id)
    with served(create_app(settings)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        shown = client.files.retrieve(file_id)
        assert (shown.purpose, shown.status) == ("fine-tune-results", "processed")
        read = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert tuple(read[0]) == results.COLUMNS
    assert [int(row["step"]) for row in read] == list(range(71))
    points = store.points(database, lease.job_id, limit=10_000).items
    by_step = {evaluation.step: evaluation for evaluation in store.evaluations(database, lease.job_id)}
    for point, row in zip([None, *points], read, strict=True):
        evaluation = by_step.get(int(row["step"]))
        assert number(row["train_loss"]) == (point.loss if point else None)
        assert number(row["train_accuracy"]) == (point.accuracy if point else None)
        assert number(row["learning_rate"]) == (point.learning_rate if point else None)
        assert number(row["valid_loss"]) == (evaluation.loss if evaluation else None)
        assert number(row["valid_mean_token_accuracy"]) == (evaluation.accuracy if evaluation else None)


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def test_a_step_has_one_line_whatever_is_known_of_it() -> None:
    points = [Point(step=2, loss=1.5, accuracy=None, learning_rate=0.1), Point(step=3, loss=0.5, learning_rate=1e-07)]
    evaluations = [
        Evaluation(step=0, loss=3.0),
        Evaluation(step=3, loss=2.0, accuracy=0.25),
        Evaluation(step=4, loss=1.0),
    ]
    assert list(results.lines(points, evaluations))[1:] == [
        "0,,,3.0,,\n", "2,1.5,,,,0.1\n", "3,0.5,,2.0,0.25,1e-07\n", "4,,,1.0,,\n"
    ]  # fmt: skip


def test_a_job_that_has_succeeded_has_its_results_in_the_same_moment(database: Database, settings: Settings) -> None:
    lease = trained(database, settings)
    results.make_early(database, settings, lease.job_id, lease.fence, 20.0)
    assert attached(database, lease.job_id) == []
    leases.finish(database, settings, lease, SUCCEEDED)
    [file] = stored(database)
    assert attached(database, lease.job_id) == [file.id]
    assert store.get(database, lease.job_id).results_due_at is None
    assert not results.make_due(database, settings, lease.job_id)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_job_that_ended_otherwise_has_what_it_got_to(database: Database, settings: Settings, end: str) -> None:
    lease = trained(database, settings, steps=2)
    if end == "failed":
        leases.finish(database, settings, lease, BROKEN)
    else:
        wishes.pause(database, lease.job_id)
        leases.finish(database, settings, lease, Outcome("stopped", 0))
        wishes.cancel(database, settings, lease.job_id)
    assert not results.make_due(database, settings)  # its worker makes it, others a minute later
    assert results.make_due(database, settings, lease.job_id)
    [file] = stored(database)
    assert attached(database, lease.job_id) == [file.id]
    assert text(settings, file).count("\n") == 4


def test_without_a_step_or_without_the_openai_protocol_there_is_none(database: Database, settings: Settings) -> None:
    leases.finish(database, settings, claimed(database, settings), BROKEN)
    wishes.cancel(database, settings, submit(database, settings).id)
    lease = trained(database, settings, tuned=False)
    finish_early(database, settings, lease)
    due_now(database)
    assert not results.make_due(database, settings)
    assert stored(database) == []


def test_of_many_who_try_at_once_one_makes_it(database: Database, settings: Settings) -> None:
    lease = trained(database, settings)
    leases.finish(database, settings, lease, SUCCEEDED)
    due_now(database)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: results.make_due(database, settings), range(4)))
    assert made.count(True) == 1
    assert [file.id for file in stored(database)] == attached(database, lease.job_id)


def test_who_was_too_slow_removes_theirs(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = trained(database, settings)
    leases.finish(database, settings, lease, SUCCEEDED)
    due_now(database)
    make = results.make

    def slowly(*arguments: Any) -> StoredFile:
        made = make(*arguments)
        monkeypatch.setattr(results, "make", make)
        due_now(database)  # so long did it take
        assert results.make_due(database, settings)
        return made

    monkeypatch.setattr(results, "make", slowly)
    assert results.make_due(database, settings)
    assert [file.id for file in stored(database)] == attached(database, lease.job_id)


def test_what_an_attempt_left_that_was_lost_is_not_the_jobs(database: Database, settings: Settings) -> None:
    expired = settings.model_copy(update={"lease_seconds": -1})
    lease = trained(database, expired)
    results.make_early(database, settings, lease.job_id, lease.fence, 20.0)
    upkeep.requeue_lost(database, settings)
    [stale] = stored(database)
    with database.transaction() as session:
        session.execute(update(Job).values(not_before=0.0))
    again = leases.claim(database, settings, lease.job_id, "w")
    assert again is not None
    reports.record(database, again, [(9, started(1)), (10, step(2, 9.0)), (11, step(3, 8.0))], 11)
    finish_early(database, settings, again)
    [file] = stored(database)
    assert attached(database, lease.job_id) == [file.id]
    assert file.id != stale.id
    assert "\n3,8.0," in text(settings, file)


def test_a_store_that_is_away_keeps_no_job_from_ending_and_gets_it_later(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = filestore.put

    def away(*_: object) -> None:
        raise StoreAway("written", "no route to host")

    monkeypatch.setattr(filestore, "put", away)
    lease = trained(database, settings)
    finish_early(database, settings, lease)
    assert store.get(database, lease.job_id).state == "succeeded"
    due_now(database)
    with pytest.raises(StoreAway):
        results.make_due(database, settings)
    monkeypatch.setattr(filestore, "put", put)
    assert not results.make_due(database, settings)  # not before its time
    due_now(database)
    maker = Maker(database, settings.model_copy(update={"upkeep_seconds": 0.01}))
    maker.start()
    while not attached(database, lease.job_id):
        assert maker._thread.is_alive()
    maker.close()
    assert [file.id for file in stored(database)] == attached(database, lease.job_id)


def test_a_store_that_hangs_costs_no_lease(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, going_on, removed = trained(database, settings), threading.Event(), threading.Event()
    put, remove = filestore.put, files.remove

    def hang(*arguments: Any) -> None:
        going_on.wait(20)
        put(*arguments)

    def noted(*arguments: Any) -> None:
        remove(*arguments)
        removed.set()

    monkeypatch.setattr(filestore, "put", hang)
    monkeypatch.setattr(files, "remove", noted)
    results.make_early(database, settings, lease.job_id, lease.fence, 0.05)
    leases.finish(database, settings, lease, SUCCEEDED)
    going_on.set()
    assert removed.wait(20)
    assert stored(database) == []
    assert results.make_due(database, settings, lease.job_id)
    assert [file.id for file in stored(database)] == attached(database, lease.job_id)


def test_it_outlives_its_job(database: Database, settings: Settings) -> None:
    lease = trained(database, settings)
    finish_early(database, settings, lease)
    [file] = stored(database)
    wishes.remove(database, lease.job_id)
    assert text(settings, file)
    files.remove(database, settings, file.id)
    assert stored(database) == []
