"""The reaper's rounds with a real broker."""

import threading

import redis

from jobs import reaper, submission
from jobs.database import Database
from jobs.queue import Doorbell, queue_of
from jobs.requests import JobRequest
from jobs.settings import Settings
from tests.conftest import Broker, job_body


def test_messages_that_nobody_takes_do_not_pile_up(database: Database, settings: Settings, broker: Broker) -> None:
    quick = settings.model_copy(update={"upkeep_seconds": 0.01, "redis_url": broker.url})
    submission.create(database, quick, JobRequest.model_validate(job_body()))
    doorbell, queue = Doorbell(quick), queue_of(quick, "any", 1)
    for number in range(250):
        doorbell.ring(queue, f"job-{number}")
    stop = threading.Event()
    reaping = threading.Thread(target=reaper.run, args=(database, quick, stop))
    reaping.start()
    while doorbell.waiting([queue])[queue] > 102:
        assert reaping.is_alive()
    stop.set()
    reaping.join()
    client = redis.Redis.from_url(broker.url)
    kept = b"".join(client.lrange(queue, 0, -1)).decode()
    client.close()
    assert "'job-249'" in kept and "'job-0'" not in kept
