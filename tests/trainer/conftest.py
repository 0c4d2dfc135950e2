"""A process group of this one process, made once: DeepSpeed remembers the first one it sees."""

from collections.abc import Iterator

import pytest

from trainer.process import free_port
from trainer.train import distributed


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    own = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    group = distributed()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in own.items():
            patch.setenv(key, value)
        group.__enter__()
    # The environment is as it was: processes that tests start are no ranks of this group.
    yield
    group.__exit__(None, None, None)
