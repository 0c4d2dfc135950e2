"""Celery as the doorbell: a message carries a job id and no more; to lose or to double one is harmless."""

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from jobs.settings import Settings

TRAIN = "stiefel.train"

# What a broker that is down makes of a publish.
BROKER_ERRORS: tuple[type[Exception], ...] = (OperationalError, RedisError, ConnectionError)


def make_celery(settings: Settings) -> Celery:
    app = Celery("stiefel", broker=settings.redis_url)
    app.conf.update(
        task_default_queue=settings.queue,
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
            **{"max_retries": 1, "interval_start": 0.05, "interval_step": 0.0},
        }
        self._queue = settings.queue

    def ring(self, job_id: str) -> None:
        """Raises one of BROKER_ERRORS when the broker cannot be reached."""
        self._app.send_task(TRAIN, args=(job_id,), queue=self._queue, retry=False)

    def waiting(self) -> int:
        """Messages that no worker has taken yet. Raises one of BROKER_ERRORS."""
        with self._app.connection_for_read() as connection:
            client = connection.default_channel.client  # redis-py's client, which is what the length is asked of
            return int(client.llen(self._queue))
