"""Webhooks: who wants to be told of which jobs' end, where, and what is to be said.

A message is a row that is written in the transaction that ends its job: none is lost, and none tells of what did not
happen. `jobs.deliveries` brings it where it belongs.
"""

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import Select, delete, func, select, tuple_
from sqlalchemy.orm import Session

from jobs import places
from jobs.database import Database, clock
from jobs.errors import NotDelivered, QuotaExceeded, Refused, UnknownCursor, WebhookNotFound
from jobs.outward import NotCalled, Outward
from jobs.settings import Settings
from jobs.store import Page
from jobs.tables import Delivery, Job, Webhook

# Of a job that was made through /v1/fine_tuning/jobs, and of one that was made through /v1/jobs.
EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)

MOST_WEBHOOKS = 20  # of one owner
# The body of a test tells of no job that there is.
_SAMPLE = "0" * 20


@dataclass(frozen=True)
class Change:
    """What is to be changed; None: stays."""

    url: str | None = None
    name: str | None = None
    events: Sequence[EventType] | None = None


def create(
    database: Database, settings: Settings, owner: str, url: str, name: str, events: Sequence[EventType]
) -> Webhook:
    """∅ → a webhook, with its secret. Raises Refused and QuotaExceeded."""
    _check(settings, url)
    with database.transaction() as session:
        have = session.scalar(select(func.count()).select_from(Webhook).where(Webhook.owner == owner)) or 0
        if have >= MOST_WEBHOOKS:
            raise QuotaExceeded("webhooks", str(have), str(MOST_WEBHOOKS), "delete one that is not needed any more")
        at = clock(session)
        webhook = Webhook(
            id=f"we_{secrets.token_hex(12)}",
            owner=owner,
            url=url,
            name=name,
            events=_in_order(events),
            secret=_new_secret(),
            created_at=at,
            updated_at=at,
        )
        session.add(webhook)
    return webhook


def change(database: Database, settings: Settings, webhook_id: str, of: str | None, wanted: Change) -> Webhook:
    """A webhook whose receiver was gone is called again. Raises Refused and WebhookNotFound."""
    if wanted.url is not None:
        _check(settings, wanted.url)
    with database.transaction() as session:
        webhook = _held(session, webhook_id, of)
        before = (webhook.url, webhook.name, webhook.events, webhook.gone_at)
        webhook.url = wanted.url or webhook.url
        webhook.name = webhook.name if wanted.name is None else wanted.name
        webhook.events = webhook.events if wanted.events is None else _in_order(wanted.events)
        webhook.gone_at = None
        if (webhook.url, webhook.name, webhook.events, webhook.gone_at) != before:
            webhook.updated_at = clock(session)
    return webhook


def rotate(database: Database, webhook_id: str, of: str | None, keep_seconds: float = 0.0) -> Webhook:
    """A new secret; the old one signs too for `keep_seconds`. Raises WebhookNotFound."""
    with database.transaction() as session:
        webhook = _held(session, webhook_id, of)
        at = clock(session)
        webhook.old_secret, webhook.old_secret_until = webhook.secret, at + keep_seconds
        webhook.secret, webhook.updated_at = _new_secret(), at
    return webhook


def remove(database: Database, webhook_id: str, of: str | None) -> None:
    """A webhook → ∅, with what has not been delivered yet. Raises WebhookNotFound."""
    with database.transaction() as session:
        places.leave(database, session, _held(session, webhook_id, of))
        session.execute(delete(Delivery).where(Delivery.webhook_id == webhook_id))
        session.execute(delete(Webhook).where(Webhook.id == webhook_id))


def get(database: Database, webhook_id: str, of: str | None) -> Webhook:
    """`of`: whose webhooks the caller sees, None for everybody's. Raises WebhookNotFound."""
    with database.reading() as session:
        webhook = session.get(Webhook, webhook_id)
    if webhook is None or of not in (None, webhook.owner):
        raise WebhookNotFound(webhook_id)
    return webhook


def list_webhooks(database: Database, of: str | None, after: str | None, limit: int) -> Page[Webhook]:
    """Newest first. Raises UnknownCursor."""
    query = select(Webhook).order_by(Webhook.created_at.desc(), Webhook.id.desc()).limit(limit + 1)
    if of is not None:
        query = query.where(Webhook.owner == of)
    with database.reading() as session:
        if after is not None:
            place = places.behind(session, Webhook, after, of, "webhook")
            query = query.where(tuple_(Webhook.created_at, Webhook.id) < place)
        found = session.scalars(query).all()
    return Page(found[:limit], len(found) > limit)


def deliveries(database: Database, webhook_id: str, of: str | None, after: str | None, limit: int) -> Page[Delivery]:
    """Newest first, for as long as they are kept. Raises WebhookNotFound and UnknownCursor."""
    get(database, webhook_id, of)
    query = select(Delivery).where(Delivery.webhook_id == webhook_id)
    query = query.order_by(Delivery.created_at.desc(), Delivery.id.desc()).limit(limit + 1)
    with database.reading() as session:
        if after is not None:
            last = session.get(Delivery, after)
            if last is None or last.webhook_id != webhook_id:
                raise UnknownCursor(after, "delivery")
            query = query.where(tuple_(Delivery.created_at, Delivery.id) < (last.created_at, last.id))
        found = session.scalars(query).all()
    return Page(found[:limit], len(found) > limit)


def tell(session: Session, settings: Settings, job: Job) -> None:
    """Into the deliveries, where anybody wants to know: the job has ended, as its state says.

    An installation that calls nobody writes none: whoever lets it call again must not be told of what was long ago.
    """
    if settings.webhooks_reach == "off":
        return
    prefix = "job" if job.tuning is None else "fine_tuning.job"
    shown = job.id if job.tuning is None else f"ftjob-{job.id.removeprefix('job-')}"
    kind = f"{prefix}.{job.state}"
    # Held, or one that is removed at this moment would take the end of the job with it.
    wanting = select(Webhook).where(Webhook.owner == job.owner, Webhook.gone_at.is_(None)).order_by(Webhook.id)
    found = session.scalars(wanting.with_for_update(read=True, key_share=True)).all()
    at = clock(session)
    body = _body(kind, shown, at)
    session.add_all(_delivery(webhook, job.id, body, at) for webhook in found if kind in webhook.events)


def test(database: Database, settings: Settings, webhook_id: str, of: str | None, kind: EventType) -> Delivery:
    """A message that tells of no job; it is tried once. Raises WebhookNotFound, and NotDelivered where none is sent."""
    with database.transaction() as session:
        webhook = _held(session, webhook_id, of)
        try:
            Outward(settings.webhooks_reach).check(webhook.url)
        except NotCalled as error:
            raise NotDelivered(webhook.url, str(error)) from error
        at = clock(session)
        prefix = "ftjob-" if kind.startswith("fine_tuning.") else "job-"
        delivery = _delivery(webhook, "", _body(kind, prefix + _SAMPLE, at), at)
        session.add(delivery)
    return delivery


def delivery(database: Database, delivery_id: str) -> Delivery | None:
    with database.reading() as session:
        return session.get(Delivery, delivery_id)


def _body(kind: str, job_id: str, at: float) -> dict[str, Any]:
    """In OpenAI's shape. One event, to however many webhooks."""
    event_id = f"evt_{secrets.token_hex(12)}"
    return {"object": "event", "id": event_id, "type": kind, "created_at": int(at), "data": {"id": job_id}}


def _delivery(webhook: Webhook, job_id: str, body: dict[str, Any], at: float) -> Delivery:
    return Delivery(
        id=f"wh_{secrets.token_hex(12)}",
        webhook_id=webhook.id,
        job_id=job_id,
        body=body,
        created_at=at,
        due_at=at,
        tries=0,
    )


def _held(session: Session, webhook_id: str, of: str | None) -> Webhook:
    query: Select[Webhook] = select(Webhook).where(Webhook.id == webhook_id)
    webhook = session.scalar(query.with_for_update())
    if webhook is None or of not in (None, webhook.owner):
        raise WebhookNotFound(webhook_id)
    return webhook


def _check(settings: Settings, url: str) -> None:
    try:
        Outward(settings.webhooks_reach).check(url)
    except NotCalled as error:
        raise Refused("url", str(error)) from error


def _in_order(events: Sequence[EventType]) -> list[str]:
    """Each once."""
    return [event for event in EVENT_TYPES if event in events]


def _new_secret() -> str:
    """256 bits, as Standard Webhooks writes them."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
