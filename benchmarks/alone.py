"""A process group of one process, for benchmarks that call the trainer's code directly. To be imported before it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

with redirect_stdout(sys.stderr):
    # DeepSpeed logs to whatever is stdout while it is imported, and stdout is for results.
    import deepspeed  # noqa: F401

from trainer.process import free_port
from trainer.train import distributed


@contextmanager
def alone() -> Iterator[None]:
    """The environment of a single rank, and its group, which the methods' collectives ask for."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(own | {"MASTER_PORT": str(free_port())})
    with distributed():
        yield
