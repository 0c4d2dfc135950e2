"""Messages on their way: tried again, given up, by any number of reapers. On SQLite and on PostgreSQL."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from openai import InvalidWebhookSignatureError
from sqlalchemy import update

from jobs import deliveries, webhooks, wishes
from jobs import lease as leases
from jobs.database import Database, now
from jobs.deliveries import DELAYS, Deliverer
from jobs.errors import NotDelivered, Refused
from jobs.lease import Outcome
from jobs.outward import Outward
from jobs.settings import Settings
from jobs.tables import Delivery, Webhook
from jobs.webhooks import Change
from tests.jobs.test_webhooks import all_due, claimed, counted, hook, rows, submit, until, unwrapped
from tests.receiver import Receiver


@pytest.fixture
def deliverer(database: Database, settings: Settings) -> Iterator[Deliverer]:
    made = Deliverer(database, settings, seconds=1.0)
    yield made
    made.close()


def test_a_receiver_that_fails_twice_gets_it_the_third_time_under_the_same_id(
    database: Database, settings: Settings, deliverer: Deliverer
) -> None:
    with Receiver([500, 429]) as receiver:
        webhook = hook(database, settings, receiver.url)
        wishes.cancel(database, settings, submit(database, settings).id)
        for tries, delay in ((1, DELAYS[0]), (2, DELAYS[1])):
            until(deliverer, lambda wanted=tries: counted(database).get("failed") == wanted)
            [row] = rows(database)
            assert row.due_at is not None
            assert 0.7 * delay < row.due_at - row.created_at < 1.3 * delay + 20
            all_due(database)
        until(deliverer, lambda: rows(database)[0].delivered_at)
        got = [receiver.next() for _ in range(3)]
    assert len({one.headers["webhook-id"] for one in got}) == 1
    assert len({one.body for one in got}) == 1
    for one in got:
        assert unwrapped(one, webhook.secret).type == "fine_tuning.job.cancelled"
    assert counted(database) == {"failed": 2, "delivered": 1}


def test_it_is_given_up_in_the_end(database: Database, settings: Settings, deliverer: Deliverer) -> None:
    assert 86400 < sum(DELAYS) < 2 * 86400
    with Receiver([500] * 20) as receiver:
        hook(database, settings, receiver.url)
        wishes.cancel(database, settings, submit(database, settings).id)

        def over() -> bool:
            all_due(database)
            return rows(database)[0].due_at is None

        until(deliverer, over)
        assert receiver.got.qsize() == len(DELAYS) + 1
    [row] = rows(database)
    assert (row.tries, row.status, row.delivered_at) == (len(DELAYS) + 1, 500, None)
    assert counted(database) == {"failed": len(DELAYS), "given_up": 1}


def test_one_that_hangs_delays_neither_upkeep_nor_other_receivers(
    database: Database, settings: Settings, deliverer: Deliverer
) -> None:
    answering = threading.Event()

    def hang() -> int:
        answering.wait(20)
        return 200

    with Receiver([hang] * 10) as slow, Receiver() as quick:
        hook(database, settings, slow.url)
        wishes.cancel(database, settings, submit(database, settings).id)
        assert deliverer.start_due() == 1  # and is back
        slow.next()
        hook(database, settings, quick.url)
        wishes.cancel(database, settings, submit(database, settings).id)
        deliverer.start_due()
        quick.next()
        until(deliverer, lambda: counted(database).get("failed"))
        answering.set()
    failed = next(row for row in rows(database) if row.answered and row.delivered_at is None)
    assert failed.answered == "no answer within 1 s"


def test_a_redirect_is_not_followed(database: Database, settings: Settings, deliverer: Deliverer) -> None:
    with Receiver() as inside, Receiver([307], location=inside.url) as receiver:
        hook(database, settings, receiver.url)
        wishes.cancel(database, settings, submit(database, settings).id)
        until(deliverer, lambda: rows(database)[0].answered)
        assert inside.got.empty()
    [row] = rows(database)
    assert (row.status, row.delivered_at) == (307, None)
    assert "not followed" in (row.answered or "")


def test_a_receiver_that_is_gone_gets_nothing_more(
    database: Database, settings: Settings, deliverer: Deliverer
) -> None:
    with Receiver([410]) as receiver:
        webhook = hook(database, settings, receiver.url)
        for _ in range(3):
            wishes.cancel(database, settings, submit(database, settings).id)
        until(deliverer, lambda: all(row.due_at is None for row in rows(database)))
        wishes.cancel(database, settings, submit(database, settings).id)
        assert len(rows(database)) == 3
        assert receiver.got.qsize() == 1
        assert webhooks.get(database, webhook.id, None).gone_at is not None
        # Until its owner says otherwise.
        webhooks.change(database, settings, webhook.id, None, Change(name="again"))
        wishes.cancel(database, settings, submit(database, settings).id)
        until(deliverer, lambda: any(row.delivered_at for row in rows(database)))


def test_who_is_killed_between_sending_and_noting_sends_it_again_under_the_same_id(
    database: Database, settings: Settings, deliverer: Deliverer
) -> None:
    with Receiver() as receiver:
        hook(database, settings, receiver.url)
        wishes.cancel(database, settings, submit(database, settings).id)
        killed = multiprocessing.get_context("spawn").Process(target=_send_and_die, args=(settings,))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        first = receiver.next()
        [row] = rows(database)
        assert row.due_at is not None and row.answered is None
        assert deliverer.start_due() == 0  # for a while it may still be on its way
        all_due(database)
        until(deliverer, lambda: rows(database)[0].delivered_at)
        second = receiver.next()
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


def _send_and_die(settings: Settings) -> None:
    message = deliveries.take(Database(settings.url))
    assert message is not None
    assert deliveries.send(Outward("any"), message).arrived
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_message_is_taken_by_one_of_many(database: Database, settings: Settings) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    for _ in range(6):
        wishes.cancel(database, settings, submit(database, settings).id)

    def take_all(_: int) -> list[str]:
        found = []
        while (message := deliveries.take(database)) is not None:
            found.append(message.id)
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = [one for found in pool.map(take_all, range(4)) for one in found]
    assert sorted(taken) == sorted(row.id for row in rows(database))


def test_who_was_too_slow_does_not_undo_what_another_has_noted(database: Database, settings: Settings) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    wishes.cancel(database, settings, submit(database, settings).id)
    slow = deliveries.take(database)
    all_due(database)
    quick = deliveries.take(database)
    assert slow is not None and quick is not None and slow.id == quick.id
    deliveries.note(database, quick, deliveries.Answer(200, "200"))
    deliveries.note(database, slow, deliveries.Answer(None, "no answer"))
    [row] = rows(database)
    assert row.delivered_at is not None and row.due_at is None


def test_one_owners_slow_receivers_leave_room_for_others(database: Database, settings: Settings) -> None:
    with database.transaction() as session:
        for number in range(20):
            owner = "many" if number else "few"
            webhook = Webhook(
                id=f"we_{number}", owner=owner, url="http://127.0.0.1:9/", name="n", events=[], secret="whsec_",
                created_at=0.0, updated_at=0.0,
            )  # fmt: skip
            session.add(webhook)
            session.flush()
            body = {"type": "job.failed"}
            due = 1.0 if number else 2.0
            session.add(Delivery(id=f"wh_{number}", webhook_id=webhook.id, job_id="job", body=body, created_at=0.0,
                                 due_at=due, tries=0))  # fmt: skip
    hanging = threading.Event()
    deliverer = Deliverer(database, settings)
    deliverer._deliver = lambda message: cast(None, hanging.wait(20))  # type: ignore[method-assign]
    assert deliverer.start_due() == 5
    hanging.set()
    deliverer._closed = True


def test_an_old_secret_signs_for_a_while(database: Database, settings: Settings, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        webhook = hook(database, settings, receiver.url)
        new = webhooks.rotate(database, webhook.id, None, 60.0)
        assert new.secret != webhook.secret
        wishes.cancel(database, settings, submit(database, settings).id)
        until(deliverer, lambda: rows(database)[0].delivered_at)
        both = receiver.next()
        assert unwrapped(both, webhook.secret).id == unwrapped(both, new.secret).id
        newest = webhooks.rotate(database, webhook.id, None)
        wishes.cancel(database, settings, submit(database, settings).id)
        until(deliverer, lambda: all(row.delivered_at for row in rows(database)))
        got = receiver.next()
    unwrapped(got, newest.secret)
    with pytest.raises(InvalidWebhookSignatureError):
        unwrapped(got, new.secret)


def test_old_messages_are_forgotten_and_those_under_way_are_not(database: Database, settings: Settings) -> None:
    hook(database, settings, "http://127.0.0.1:9/")
    for _ in range(3):
        wishes.cancel(database, settings, submit(database, settings).id)
    first, second, third = (row.id for row in rows(database))
    with database.transaction() as session:
        session.execute(update(Delivery).where(Delivery.id == first).values(due_at=None, created_at=now() - 8 * 86400))
        session.execute(update(Delivery).where(Delivery.id == second).values(created_at=now() - 8 * 86400))
        session.execute(update(Delivery).where(Delivery.id == third).values(due_at=None))
    assert deliveries.forget(database) == 1
    assert {row.id for row in rows(database)} == {second, third}


def test_an_installation_may_call_nobody(database: Database, settings: Settings) -> None:
    made = hook(database, settings, "http://127.0.0.1:9/")
    wishes.cancel(database, settings, submit(database, settings).id)
    off = settings.model_copy(update={"webhooks": "off"})
    assert Deliverer(database, off).start_due() == 0
    before = rows(database)
    wishes.cancel(database, off, submit(database, off).id)
    leases.finish(database, off, claimed(database, off), Outcome("succeeded", 0))
    with pytest.raises(NotDelivered, match="calls nobody"):
        webhooks.test(database, off, made.id, None, "job.failed")
    # Nor is anything kept to be sent by an installation that calls again.
    assert [row.id for row in rows(database)] == [row.id for row in before]
    with pytest.raises(Refused, match="calls nobody"):
        hook(database, off, "https://example.org/")
