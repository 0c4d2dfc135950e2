"""/v1/webhook_endpoints, asked by OpenAI's own client. On SQLite and on PostgreSQL."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from jobs import reaper, wishes
from jobs.database import Database
from jobs.keys import Scope
from jobs.settings import Settings
from jobs.tables import Job
from jobs.webhooks import EVENT_TYPES
from tests.api.inprocess import served
from tests.api.local import Office
from tests.jobs.test_webhooks import rows, submit, unwrapped
from tests.receiver import Receiver

ALL: Any = list(EVENT_TYPES)
SUCCEEDED: Literal["fine_tuning.job.succeeded"] = "fine_tuning.job.succeeded"


class Served:
    def __init__(self, office: Office, url: str) -> None:
        self.office, self._url = office, url

    def client(self, *scopes: Scope) -> OpenAI:
        return OpenAI(base_url=f"{self._url}/v1", api_key=self.office.key(scopes or (Scope.WRITE,))[1], timeout=30)


@contextmanager
def opened(settings: Settings, database: Database) -> Iterator[Served]:
    with Office(settings, database) as office, served(office.app) as url:
        yield Served(office, url)


@pytest.fixture
def service(settings: Settings, database: Database) -> Iterator[Served]:
    with opened(settings.model_copy(update={"webhooks": "any"}), database) as found:
        yield found


def test_the_whole_life_of_a_webhook_through_the_openai_client(service: Served) -> None:
    client = service.client()
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
    url = "https://example.org/hooks"
    made = client.webhooks.create(name="mine", url=url, event_types=[SUCCEEDED, "fine_tuning.job.failed"])
    assert made.signing_secret.startswith("whsec_")
    assert (made.name, made.url) == ("mine", url)
    found = client.webhooks.retrieve(made.id)
    assert found.event_types == ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]
    assert found.signing_secret_hint is not None and found.signing_secret_hint.endswith(made.signing_secret[-4:])
    assert made.signing_secret not in found.model_dump_json()

    changed = client.webhooks.update(made.id, event_types=ALL, name="yours")
    assert (changed.name, changed.url, changed.event_types) == ("yours", url, ALL)
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret

    more = [client.webhooks.create(name=str(n), url=url, event_types=ALL).id for n in range(4)]
    assert [one.id for one in client.webhooks.list(limit=2)] == [*reversed(more), made.id]  # page after page
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no webhook"):
        client.webhooks.retrieve(made.id)


def test_a_test_says_what_the_receiver_answered(service: Served, settings: Settings, database: Database) -> None:
    """The reaper sends it, also while the broker is away; the API itself calls nobody."""
    client, stop = service.client(), threading.Event()
    quick = settings.model_copy(update={"upkeep_seconds": 0.02, "webhooks": "any"})
    reaping = threading.Thread(target=reaper.run, args=(database, quick, stop))
    reaping.start()
    with Receiver([200, 503]) as receiver:
        made = client.webhooks.create(name="n", url=receiver.url, event_types=[SUCCEEDED])
        result = client.webhooks.test(made.id, event_type=SUCCEEDED)
        assert (result.status_code, result.success, result.webhook_endpoint_id) == (200, True, made.id)
        assert type(unwrapped(receiver.next(), made.signing_secret)).__name__ == "FineTuningJobSucceededWebhookEvent"
        assert client.webhooks.test(made.id, event_type="fine_tuning.job.failed").status_code == 503
    with pytest.raises(openai.ConflictError, match="has not answered: the connection was refused"):
        client.webhooks.test(made.id, event_type=SUCCEEDED)
    stop.set()
    reaping.join()
    # Each was tried once: a person waited for it.
    assert [(row.tries, row.due_at) for row in rows(database)] == [(1, None)] * 3


def test_what_came_of_each_message_is_shown(service: Served, settings: Settings, database: Database) -> None:
    client = service.client()
    made = client.webhooks.create(name="n", url="http://127.0.0.1:9/", event_types=ALL)
    job = submit(database, settings)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(owner=client.api_key.split("-")[2]))
    wishes.cancel(database, settings, job.id)
    page = client.get(f"/webhook_endpoints/{made.id}/deliveries", cast_to=cast(Any, object))
    [delivery] = page["data"]
    assert (delivery["event_type"], delivery["state"], delivery["tries"]) == ("fine_tuning.job.cancelled", "pending", 0)
    assert delivery["job_id"] == f"ftjob-{job.id.removeprefix('job-')}"
    assert delivery["id"] == rows(database)[0].id and delivery["next_try_at"]


def test_each_key_sees_its_own_webhooks_and_nothing_of_others(service: Served) -> None:
    mine, other, admin = service.client(), service.client(), service.client(Scope.ADMIN)
    made = mine.webhooks.create(name="n", url="https://example.org/", event_types=ALL)
    assert [one.id for one in other.webhooks.list()] == []
    assert [one.id for one in admin.webhooks.list()] == [made.id]
    asked = (
        lambda: other.webhooks.retrieve(made.id),
        lambda: other.webhooks.update(made.id, name="x"),
        lambda: other.webhooks.delete(made.id),
        lambda: other.webhooks.rotate_secret(made.id),
        lambda: other.webhooks.test(made.id, event_type=SUCCEEDED),
        lambda: other.webhooks.list(after=made.id),
    )
    for ask in asked:
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            ask()
    with pytest.raises(openai.PermissionDeniedError, match="scope write"):
        service.client(Scope.READ).webhooks.create(name="n", url="https://example.org/", event_types=ALL)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://example.org/", "only https"),
        ("https://169.254.169.254/latest", "not public"),
        ("https://localhost:5432/", "inner network"),
        ("https://user:password@example.org/", "password"),
        ("gopher://example.org/", "scheme"),
    ],
)
def test_a_url_that_would_not_be_called_is_refused_by_name(
    settings: Settings, database: Database, url: str, says: str
) -> None:
    assert (
        settings.model_copy(update={"auth": "on"}).webhooks_reach == "public"
    )  # with API keys, unless it says otherwise
    with opened(settings, database) as service:
        client = service.client()
        with pytest.raises(openai.BadRequestError, match=says) as refused:
            client.webhooks.create(name="n", url=url, event_types=ALL)
        assert refused.value.param == "url"
        made = client.webhooks.create(name="n", url="https://example.org/", event_types=ALL)
        with pytest.raises(openai.BadRequestError, match=says):
            client.webhooks.update(made.id, url=url)


def test_with_api_keys_only_public_addresses_unless_the_installation_says_otherwise(settings: Settings) -> None:
    assert settings.webhooks_reach == "any"  # without keys: whoever asks could call from this machine themselves
    assert settings.model_copy(update={"auth": "on"}).webhooks_reach == "public"
    assert settings.model_copy(update={"auth": "on", "webhooks": "any"}).webhooks_reach == "any"


def test_an_event_that_never_happens_here_is_refused_by_name(service: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        service.client().webhooks.create(name="n", url="https://example.org/", event_types=["batch.completed"])
    assert str(refused.value.param).startswith("event_types")
