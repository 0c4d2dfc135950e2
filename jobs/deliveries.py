"""Webhooks' messages, from their rows to their receivers: signed as Standard Webhooks says, and tried again.

Whoever takes one notes first when it is to be tried again, then sends it, then notes what came of it: who dies in
between has sent it perhaps, and it is sent once more, under the same id. So a receiver gets each at least once, and may
get it twice. Any number of processes may do this beside one another; each counts by itself what it has under way.
"""

import base64
import hashlib
import hmac
import json
import logging
import random
import threading
from collections import Counter as Counted
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from jobs import counters
from jobs.database import Database, clock, now
from jobs.outward import NotCalled, Outward, Unanswered
from jobs.settings import Settings
from jobs.tables import Delivery, Webhook

log = logging.getLogger("stiefel.webhooks")

# Seconds before the second try, the third …; then it is given up, a day and four hours after the first.
DELAYS = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800, 43200)
_JITTER = 0.2  # of each, either way: receivers that came back must not be met by all at once
# Somebody is at it, for so long at most: the call's own limit, and looking up its name.
_HELD_SECONDS = 60.0
# What became of a message is shown for a week.
_KEPT_SECONDS = 7 * 86400.0

_AT_ONCE = 8  # calls of one process
_AT_ONCE_OF_OWNER = 4  # so that one owner's slow receivers leave room for others'

OUTCOMES = ("delivered", "failed", "given_up")
COUNTER = "webhook_deliveries"
_GONE = 410


@dataclass(frozen=True)
class Message:
    """A delivery that has been taken, and how to send it. `tries`: with this one."""

    id: str
    webhook_id: str
    owner: str
    url: str
    secrets: tuple[str, ...]
    body: bytes
    at: int
    tries: int
    last: bool

    @property
    def headers(self) -> dict[str, str]:
        signatures = [_signature(secret, self.id, self.at, self.body) for secret in self.secrets]
        return {
            "content-type": "application/json",
            "user-agent": "stiefel-webhooks/1",
            "webhook-id": self.id,
            "webhook-timestamp": str(self.at),
            "webhook-signature": " ".join(signatures),
        }


@dataclass(frozen=True)
class Answer:
    """What came of a try; without a status nobody answered."""

    status: int | None
    text: str

    @property
    def arrived(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Deliverer:
    """Sends what is due, in threads of its own, so that no receiver's slowness is anybody else's."""

    def __init__(self, database: Database, settings: Settings, seconds: float = 10.0) -> None:
        """`seconds`: a receiver has to answer."""
        self._database, self._outward = database, Outward(settings.webhooks_reach, seconds)
        self._lock = threading.Lock()
        self._under_way: dict[str, Message] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start_due(self) -> int:
        """Begin with what is due, as far as threads are free; returns with how many. Raises what the database does."""
        if self._outward.reach == "off":
            return 0
        for started in range(_AT_ONCE):  # and no more: threads go on by themselves, the caller has other things to do
            if (message := self._take()) is None:
                return started
            thread = threading.Thread(target=self._work, args=(message,), daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()
        return _AT_ONCE

    def close(self, seconds: float = 5.0) -> None:
        """Take nothing more, and wait a moment for what is under way; what is not done then is sent again."""
        self._closed = True
        with self._lock:
            left = list(self._threads)
        for thread in left:
            thread.join(seconds / len(left))

    def _work(self, message: Message | None) -> None:
        try:
            while message is not None:
                self._deliver(message)
                with self._lock:
                    del self._under_way[message.id]
                message = self._take()
        except SQLAlchemyError as error:
            log.warning("what came of a webhook's message cannot be written, so it is sent again: %s", error)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())
                if message is not None:
                    self._under_way.pop(message.id, None)

    def _deliver(self, message: Message) -> None:
        answer = send(self._outward, message)
        note(self._database, message, answer)
        outcome = "arrived" if answer.arrived else "is given up" if message.last else "is tried again"
        log.info("message %s to webhook %s %s: %s", message.id, message.webhook_id, outcome, answer.text)

    def _take(self) -> Message | None:
        # One at a time: else two would count the same free places.
        with self._lock:
            if self._closed or len(self._under_way) >= _AT_ONCE:
                return None
            owners = Counted(message.owner for message in self._under_way.values())
            full = [owner for owner, number in owners.items() if number >= _AT_ONCE_OF_OWNER]
            busy = [message.webhook_id for message in self._under_way.values()]
            message = take(self._database, busy, full)
            if message is not None:
                self._under_way[message.id] = message
            return message


def take(database: Database, busy: list[str] | None = None, full: list[str] | None = None) -> Message | None:
    """The message that is due for longest, not to a webhook that is busy nor of an owner with enough under way.

    From now on it is due again when this try would be over: that is undone by `note` alone.
    """
    query = select(Delivery, Webhook).join(Webhook, Webhook.id == Delivery.webhook_id)
    query = query.where(Delivery.due_at <= now(), Webhook.id.not_in(busy or []), Webhook.owner.not_in(full or []))
    query = query.order_by(Delivery.due_at).limit(1)
    with database.reading() as session:
        if session.execute(query).first() is None:  # as nearly always: then nobody is kept from writing
            return None
    with database.transaction() as session:
        found = session.execute(query.with_for_update(of=Delivery, skip_locked=True)).first()
        if found is None:
            return None
        delivery, webhook = found
        at = clock(session)
        delivery.tries += 1
        delivery.due_at = at + _HELD_SECONDS
        signing = [webhook.secret]
        if webhook.old_secret is not None and (webhook.old_secret_until or 0.0) > at:
            signing.append(webhook.old_secret)
        return Message(
            id=delivery.id,
            webhook_id=webhook.id,
            owner=webhook.owner,
            url=webhook.url,
            secrets=tuple(signing),
            body=json.dumps(delivery.body, separators=(",", ":")).encode(),
            at=int(at),
            tries=delivery.tries,
            last=delivery.tries > len(DELAYS) or not delivery.job_id,  # a test's sender waits for this answer
        )


def send(outward: Outward, message: Message) -> Answer:
    try:
        status = outward.post(message.url, message.body, message.headers)
    except (NotCalled, Unanswered) as error:
        return Answer(None, str(error))
    if 300 <= status < 400:
        return Answer(status, f"{status}: a redirect, which is not followed; change the webhook's URL")
    return Answer(status, str(status))


def note(database: Database, message: Message, answer: Answer) -> None:
    """The message has arrived, or is tried again, or is given up. A receiver that is gone gets nothing more."""
    over = answer.arrived or message.last or answer.status == _GONE
    outcome = "delivered" if answer.arrived else "given_up" if over else "failed"
    if answer.status == _GONE:
        with database.transaction() as session:
            # The webhook before its messages, as whoever removes it does.
            session.execute(update(Webhook).where(Webhook.id == message.webhook_id).values(gone_at=now()))
            others = (Delivery.webhook_id == message.webhook_id) & Delivery.due_at.is_not(None)
            text = "not sent: the receiver has said that it is gone (410)"
            others &= Delivery.id != message.id
            session.execute(update(Delivery).where(others).values(due_at=None, answered=text))
    with database.transaction() as session:
        delivery = session.scalar(select(Delivery).where(Delivery.id == message.id).with_for_update())
        # Who was slow, and was thought dead, must not undo what another has noted.
        if delivery is None or delivery.tries != message.tries:
            return
        at = clock(session)
        delivery.status, delivery.answered = answer.status, answer.text
        delivery.delivered_at = at if answer.arrived else None
        delivery.due_at = None if over else at + _delay(message.tries)
        counters.add(database, session, COUNTER, outcome, 1)


def forget(database: Database) -> int:
    """Remove what arrived or was given up long ago; returns how many."""
    old = Delivery.due_at.is_(None) & (Delivery.created_at < now() - _KEPT_SECONDS)
    with database.reading() as session:
        if session.scalar(select(Delivery.id).where(old).limit(1)) is None:
            return 0
    with database.transaction() as session:
        return len(session.execute(delete(Delivery).where(old).returning(Delivery.id)).all())


def _delay(tries: int) -> float:
    return DELAYS[tries - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)


def _signature(secret: str, message_id: str, at: int, body: bytes) -> str:
    """HMAC-SHA-256 of id.timestamp.body."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = b".".join([message_id.encode(), str(at).encode(), body])
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"
