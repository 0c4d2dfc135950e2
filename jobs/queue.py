"""Celery as the doorbell: a message carries a job id and no more; to lose or to double one is harmless.

It says "there is work that a worker like you can do", and the worker takes what is next for it. So there is a queue for
each size and kind of job, and a worker listens to those of all jobs that fit it.
"""

from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit, urlunsplit

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from jobs.settings import Settings
from jobs.workers import Card

TRAIN = "stiefel.train"

# What a broker that is down makes of a publish.
BROKER_ERRORS: tuple[type[Exception], ...] = (OperationalError, RedisError, ConnectionError)


def queue_of(settings: Settings, device: str, devices: int) -> str:
    """Where jobs are announced that need so many devices of a kind (any, gpu, cpu)."""
    return f"{settings.queue}.{device}.{devices}"


def queues_of(settings: Settings, card: Card) -> list[str]:
    """Those of all jobs that fit the worker."""
    sizes = range(1, card.devices + 1)
    return [queue_of(settings, device, size) for device in ("any", card.device) for size in sizes]


def verified(url: str) -> str:
    """With TLS, the server's certificate is checked unless the URL says otherwise: by itself the client does not."""
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in parse_qs(parts.query):
        return url
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, "ssl_cert_reqs=required"]))))


def make_celery(settings: Settings) -> Celery:
    app = Celery("stiefel", broker=verified(settings.redis_url))
    app.conf.update(
        task_default_queue=settings.queue,
        # One list a queue, not one for each priority of messages: priorities are the database's.
        broker_transport_options={"priority_steps": [0]},
        task_ignore_result=True,
        # The message is gone before the work begins: whether a job still has to run is for the database to say.
        task_acks_late=False,
        # A worker that is busy must leave the next message to one that is not.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    return app


class Doorbell:
    """Tells workers that a job waits."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)
        # Fail fast: the caller has a user waiting, and the outbox keeps the message for later.
        self._app.conf.broker_transport_options = {
            **{"socket_connect_timeout": 1, "socket_timeout": 1},
            **{"max_retries": 1, "interval_start": 0.05, "interval_step": 0.0, "priority_steps": [0]},
        }

    def ring(self, queue: str, job_id: str) -> None:
        """Raises one of BROKER_ERRORS when the broker cannot be reached."""
        self._app.send_task(TRAIN, args=(job_id,), queue=queue, retry=False)

    def waiting(self, queues: Iterable[str]) -> dict[str, int]:
        """Messages in each queue that no worker has taken yet. Raises one of BROKER_ERRORS."""
        with self._app.connection_for_read() as connection:
            client = connection.default_channel.client  # redis-py's client, which is what the length is asked of
            return {queue: int(client.llen(queue)) for queue in queues}

    def forget(self, queue: str, keep: int) -> None:
        """All messages of the queue but the newest `keep`. Raises one of BROKER_ERRORS."""
        with self._app.connection_for_write() as connection:
            # New ones are put in at the left.
            connection.default_channel.client.ltrim(queue, 0, keep - 1)
