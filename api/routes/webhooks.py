"""/v1/webhook_endpoints: to be told when jobs end. As OpenAI's clients ask for it, and what came of each message.

Imports no torch. Messages are sent by the reaper alone: the API calls nobody, also not for a test.
"""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from api.answers import documented
from api.auth import Reader, Writer
from api.deps import Given, Services
from api.views import ListView
from jobs import webhooks
from jobs.errors import NotDelivered
from jobs.tables import Delivery, Webhook
from jobs.webhooks import EVENT_TYPES, Change, EventType

router = APIRouter(tags=["webhooks"], responses=documented(401, 403, 413, 429, 503))
_PATH = "/v1/webhook_endpoints"

# Longer than a reaper's round and a receiver's time to answer.
_TEST_SECONDS = 20.0
_DAY = 86400.0

# PostgreSQL cannot store U+0000.
_Url = Annotated[str, Field(min_length=1, max_length=4096, pattern="^[^\x00]*$", description="https, and public")]
_Name = Annotated[str, Field(min_length=1, max_length=255, pattern="^[^\x00]*$", description="to find it again")]
_Events = Annotated[list[EventType], Field(min_length=1, max_length=100, description="what to be told of")]
_After = Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$", description="last id of the page before")]
_Limit = Annotated[int, Query(ge=1, le=100)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewWebhook(_Body):
    url: _Url
    name: _Name = "webhook"
    event_types: _Events = list(EVENT_TYPES)


class WebhookChange(_Body):
    """What is left out stays as it is."""

    url: _Url | None = None
    name: _Name | None = None
    event_types: _Events | None = None


class Rotation(_Body):
    keep_old_secret_active_for_24_hours: bool = Field(
        default=False, description="messages are signed with both for a day"
    )


class TestRequest(_Body):
    event_type: EventType


class WebhookView(BaseModel):
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: str
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    status: Literal["enabled", "gone"] = Field(
        description="gone: its receiver answered 410, and is sent nothing more until the webhook is updated"
    )


class WebhookWithSecret(WebhookView):
    signing_secret: str = Field(description="shown this once; what verifies messages")


class WebhookDeleted(BaseModel):
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    id: str
    deleted: Literal[True] = True


class TestResult(BaseModel):
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypes(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


class DeliveryView(BaseModel):
    """One message. Its id is in the header webhook-id, the same however often it is sent."""

    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str
    event_type: str
    event_id: str
    job_id: str | None = Field(description="as the event names it; null of a test")
    created_at: int
    tries: int
    state: Literal["pending", "delivered", "given_up"]
    next_try_at: int | None
    delivered_at: int | None
    answer: str | None = Field(description="what came of the last try")
    status_code: int | None


@router.get("/v1/webhook_event_types")
def list_event_types(_: Reader) -> EventTypes:
    """What one can be told of: `fine_tuning.job.…` of jobs made under /v1/fine_tuning/jobs, `job.…` of others."""
    return EventTypes(data=list(EVENT_TYPES))


@router.post(_PATH, responses=documented(400))
def create_webhook(given: Given, caller: Writer, request: NewWebhook) -> WebhookWithSecret:
    """Be told of the caller's jobs. The signing secret is in this answer and in no other."""
    webhook = webhooks.create(
        given.database, given.settings, caller.owner, request.url, request.name, request.event_types
    )
    return _with_secret(webhook)


@router.get(_PATH, responses=documented(400))
def list_webhooks(given: Given, caller: Reader, after: _After = None, limit: _Limit = 20) -> ListView[WebhookView]:
    """Newest first: the caller's, or everybody's for an administrator."""
    page = webhooks.list_webhooks(given.database, caller.sees, after, limit)
    found = [_view(webhook) for webhook in page.items]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[WebhookView](data=found, has_more=page.has_more, first_id=first, last_id=last)


@router.get(f"{_PATH}/{{webhook_endpoint_id}}", responses=documented(404))
def get_webhook(given: Given, caller: Reader, webhook_endpoint_id: str) -> WebhookView:
    return _view(webhooks.get(given.database, webhook_endpoint_id, caller.sees))


@router.post(f"{_PATH}/{{webhook_endpoint_id}}", responses=documented(400, 404))
def update_webhook(given: Given, caller: Writer, webhook_endpoint_id: str, request: WebhookChange) -> WebhookView:
    """Change what is given. One whose receiver was gone is called again."""
    wanted = Change(request.url, request.name, request.event_types)
    return _view(webhooks.change(given.database, given.settings, webhook_endpoint_id, caller.sees, wanted))


@router.delete(f"{_PATH}/{{webhook_endpoint_id}}", responses=documented(404))
def delete_webhook(given: Given, caller: Writer, webhook_endpoint_id: str) -> WebhookDeleted:
    """What has not been delivered yet is not."""
    webhooks.remove(given.database, webhook_endpoint_id, caller.sees)
    return WebhookDeleted(id=webhook_endpoint_id)


@router.post(f"{_PATH}/{{webhook_endpoint_id}}/rotate_secret", responses=documented(400, 404))
def rotate_secret(given: Given, caller: Writer, webhook_endpoint_id: str, request: Rotation) -> WebhookWithSecret:
    """A new signing secret, from the next message on."""
    kept = _DAY if request.keep_old_secret_active_for_24_hours else 0.0
    return _with_secret(webhooks.rotate(given.database, webhook_endpoint_id, caller.sees, kept))


@router.post(f"{_PATH}/{{webhook_endpoint_id}}/test", responses=documented(400, 404, 409))
async def test_webhook(given: Given, caller: Writer, webhook_endpoint_id: str, request: TestRequest) -> TestResult:
    """Send a sample, once, and see what is answered. A receiver that does not answer is a 409 that says why."""
    webhook = await run_in_threadpool(webhooks.get, given.database, webhook_endpoint_id, caller.sees)
    asked = (given.database, given.settings, webhook_endpoint_id, caller.sees, request.event_type)
    sent = await run_in_threadpool(webhooks.test, *asked)
    delivery = await _outcome(given, sent)
    if delivery.status is None:
        raise NotDelivered(webhook.url, delivery.answered or f"no reaper has sent it within {_TEST_SECONDS:g} s")
    return TestResult(webhook_endpoint_id=webhook.id, event_type=request.event_type, status_code=delivery.status)


@router.get(f"{_PATH}/{{webhook_endpoint_id}}/deliveries", responses=documented(400, 404))
def list_deliveries(
    given: Given, caller: Reader, webhook_endpoint_id: str, after: _After = None, limit: _Limit = 20
) -> ListView[DeliveryView]:
    """The messages of the last week, newest first, and what came of each."""
    page = webhooks.deliveries(given.database, webhook_endpoint_id, caller.sees, after, limit)
    found = [_delivery(row) for row in page.items]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[DeliveryView](data=found, has_more=page.has_more, first_id=first, last_id=last)


async def _outcome(given: Services, sent: Delivery) -> Delivery:
    """As soon as there is one, or as it stands after a while."""
    deadline = time.monotonic() + _TEST_SECONDS
    while True:
        found = await run_in_threadpool(webhooks.delivery, given.database, sent.id)
        if found is None or found.due_at is None or time.monotonic() > deadline:
            return found or sent
        await asyncio.sleep(0.1)


def _view(webhook: Webhook) -> WebhookView:
    return WebhookView(
        id=webhook.id,
        name=webhook.name,
        url=webhook.url,
        event_types=webhook.events,
        created_at=int(webhook.created_at),
        updated_at=int(webhook.updated_at),
        signing_secret_hint=f"whsec_…{webhook.secret[-4:]}",
        status="enabled" if webhook.gone_at is None else "gone",
    )


def _with_secret(webhook: Webhook) -> WebhookWithSecret:
    return WebhookWithSecret(**_view(webhook).model_dump(), signing_secret=webhook.secret)


def _delivery(row: Delivery) -> DeliveryView:
    over: Literal["delivered", "given_up"] = "delivered" if row.delivered_at is not None else "given_up"
    return DeliveryView(
        id=row.id,
        event_type=row.body["type"],
        event_id=row.body["id"],
        job_id=row.body["data"]["id"] if row.job_id else None,
        created_at=int(row.created_at),
        tries=row.tries,
        state="pending" if row.due_at is not None else over,
        next_try_at=None if row.due_at is None else int(row.due_at),
        delivered_at=None if row.delivered_at is None else int(row.delivered_at),
        answer=row.answered,
        status_code=row.status,
    )
