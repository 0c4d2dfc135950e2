"""A process group of this one process, made once: DeepSpeed remembers the first one it sees."""

from collections.abc import Iterator

import pytest

from trainer.process import free_port
from trainer.train import distributed

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.fixture(scope="session")
def _group() -> Iterator[None]:
    group = distributed()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in RANK.items():
            patch.setenv(key, value)
        group.__enter__()
    yield
    group.__exit__(None, None, None)


@pytest.fixture
def process_group(_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a rank, for this test alone: processes that other tests start are no ranks."""
    for key, value in RANK.items():
        monkeypatch.setenv(key, value)
