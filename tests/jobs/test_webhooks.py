"""Webhooks' messages: written with the end of a job or not at all, signed, tried again. On SQLite and on PostgreSQL."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import select, update

from jobs import deliveries, submission, upkeep, webhooks, wishes
from jobs import lease as leases
from jobs.database import Database, now
from jobs.deliveries import Deliverer
from jobs.errors import QuotaExceeded, WebhookNotFound
from jobs.lease import Lease, Outcome
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import Counter, Delivery, Job, Webhook
from jobs.webhooks import EVENT_TYPES, EventType
from tests.conftest import job_body
from tests.receiver import Got, Receiver

CLIENT = OpenAI(api_key="unused", webhook_secret="unused")


@pytest.fixture
def deliverer(database: Database, settings: Settings) -> Iterator[Deliverer]:
    made = Deliverer(database, settings, seconds=1.0)
    yield made
    made.close()


def hook(
    database: Database, settings: Settings, url: str, events: Sequence[EventType] = EVENT_TYPES, owner: str = ""
) -> Webhook:
    return webhooks.create(database, settings, owner, url, "mine", events)


def submit(database: Database, settings: Settings, tuned: bool = True) -> Job:
    job = submission.create(database, settings, JobRequest.model_validate(job_body()))
    if tuned:
        with database.transaction() as session:
            session.execute(update(Job).where(Job.id == job.id).values(tuning={}))
    return job


def claimed(database: Database, settings: Settings, tuned: bool = True) -> Lease:
    lease = leases.claim(database, settings, submit(database, settings, tuned).id, "w")
    assert lease is not None
    return lease


def rows(database: Database) -> list[Delivery]:
    with database.reading() as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.created_at)))


def all_due(database: Database) -> None:
    """As if the time until the next try were over."""
    with database.transaction() as session:
        session.execute(update(Delivery).where(Delivery.due_at.is_not(None)).values(due_at=now()))


def until(deliverer: Deliverer, done: Callable[[], Any]) -> None:
    """Rounds of a reaper."""
    for _ in range(2000):
        deliverer.start_due()
        if done():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def counted(database: Database) -> dict[str, float]:
    with database.reading() as session:
        found = session.scalars(select(Counter).where(Counter.name == deliveries.COUNTER)).all()
    return {row.label: row.value for row in found}


def unwrapped(got: Got, secret: str) -> Any:
    return CLIENT.webhooks.unwrap(got.body, got.headers, secret=secret)


ENDS: dict[str, Callable[[Database, Settings, bool], Any]] = {
    "succeeded": lambda database, settings, tuned: leases.finish(
        database, settings, claimed(database, settings, tuned), Outcome("succeeded", 0)
    ),
    "failed": lambda database, settings, tuned: leases.finish(
        database,
        settings,
        claimed(database, settings, tuned),
        Outcome("failed", 1, {"code": "bad_data", "message": "none"}),
    ),
    "cancelled": lambda database, settings, tuned: wishes.cancel(
        database, settings, submit(database, settings, tuned).id
    ),
}


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("state", ENDS)
def test_the_end_of_a_job_arrives_as_the_openai_client_understands_it(
    database: Database, settings: Settings, deliverer: Deliverer, state: str, tuned: bool
) -> None:
    with Receiver() as receiver:
        webhook = hook(database, settings, receiver.url)
        ENDS[state](database, settings, tuned)
        until(deliverer, lambda: rows(database)[0].delivered_at)
        got = receiver.next()
    event = unwrapped(got, webhook.secret)
    [row] = rows(database)
    assert event.type == f"{'fine_tuning.job' if tuned else 'job'}.{state}"
    number = row.job_id.removeprefix("job-")
    event_as_json = json.loads(got.body)
    assert event_as_json["data"]["id"] == (f"ftjob-{number}" if tuned else row.job_id)
    if tuned:
        assert type(event).__name__ == f"FineTuningJob{state.capitalize()}WebhookEvent"
        assert event.data.id == f"ftjob-{number}"
    assert event.object == "event" and event.id.startswith("evt_")
    assert got.headers["webhook-id"] == row.id
    assert got.path == "/hooks?from=stiefel"
    assert (row.due_at, row.status, row.tries) == (None, 200, 1)
    assert counted(database) == {"delivered": 1}
    with pytest.raises(InvalidWebhookSignatureError):
        unwrapped(Got(got.path, got.headers, got.body + b" "), webhook.secret)


def test_only_what_a_webhook_asks_for_and_only_of_its_owner(database: Database, settings: Settings) -> None:
    url = "http://127.0.0.1:9/"
    wanted = hook(database, settings, url, ["fine_tuning.job.cancelled"])
    hook(database, settings, url, ["fine_tuning.job.succeeded", "job.cancelled"])
    hook(database, settings, url, owner="somebody else")
    wishes.cancel(database, settings, submit(database, settings).id)
    wishes.cancel(database, settings, rows(database)[0].job_id)  # once more changes nothing
    assert [row.webhook_id for row in rows(database)] == [wanted.id]


def test_nothing_is_told_of_a_job_that_goes_on(database: Database, settings: Settings) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    leases.finish(database, settings, claimed(database, settings), Outcome("stopped", 0))
    killed = {"code": "killed", "message": "by a signal"}
    leases.finish(database, settings, claimed(database, settings), Outcome("failed", -9, killed))
    claimed(database, settings.model_copy(update={"lease_seconds": -1}))
    upkeep.requeue_lost(database, settings)
    assert rows(database) == []


def test_a_lost_worker_that_ends_its_job_is_told(database: Database, settings: Settings) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    last = settings.model_copy(update={"lease_seconds": -1, "max_losses": 1})
    claimed(database, last)
    upkeep.requeue_lost(database, last)
    assert [row.body["type"] for row in rows(database)] == ["fine_tuning.job.failed"]


def test_a_change_that_is_rolled_back_is_not_told(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    job = submit(database, settings)
    monkeypatch.setattr(webhooks, "tell", lambda *given, tell=webhooks.tell: (tell(*given), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        wishes.cancel(database, settings, job.id)
    assert rows(database) == []


def test_a_webhook_that_is_removed_takes_its_messages_with_it(database: Database, settings: Settings) -> None:
    webhook = hook(database, settings, "http://127.0.0.1:9/")
    wishes.cancel(database, settings, submit(database, settings).id)
    message = deliveries.take(database)
    webhooks.remove(database, webhook.id, "")
    assert rows(database) == []
    assert message is not None
    deliveries.note(database, message, deliveries.Answer(200, "200"))  # whoever was under way finds nothing to note
    wishes.cancel(database, settings, submit(database, settings).id)
    with pytest.raises(WebhookNotFound):
        webhooks.get(database, webhook.id, "")


def test_jobs_end_and_webhooks_go_at_the_same_time_and_neither_fails(database: Database, settings: Settings) -> None:
    jobs = [submit(database, settings).id for _ in range(12)]
    made = [hook(database, settings, "http://127.0.0.1:9/").id for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        ending = [pool.submit(wishes.cancel, database, settings, job) for job in jobs]
        going = [pool.submit(webhooks.remove, database, one, None) for one in made]
        assert [future.result().state for future in ending] == ["cancelled"] * 12
        assert [future.result() for future in going] == [None] * 12
    assert rows(database) == []


def test_an_owner_has_so_many_webhooks_at_most(database: Database, settings: Settings) -> None:
    for _ in range(webhooks.MOST_WEBHOOKS):
        hook(database, settings, "http://127.0.0.1:9/")
    with pytest.raises(QuotaExceeded, match="webhooks"):
        hook(database, settings, "http://127.0.0.1:9/")
    hook(database, settings, "http://127.0.0.1:9/", owner="other")
