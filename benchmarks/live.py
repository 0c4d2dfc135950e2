"""python -m benchmarks.live SPEC: the bytes of live tensors while a run trains, counted as torch makes and drops them.

    with Live() as live: …      every storage that an operation returns, until its last tensor is gone

What estimates are held against (benchmarks.sizing --check).

What is no tensor is not seen: libraries' workspaces, the allocator's rounding and unused blocks, a GPU's context.
"""

import argparse
import json
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainer.config import TrainingSpec
from trainer.prepare import prepare
from trainer.process import free_port
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.train import distributed


class Live(TorchDispatchMode):
    """`now`, and `peak` since the last `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number not in self._known:
            self._known.add(number)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, number, size)

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


@dataclass(frozen=True)
class Measured:
    """Bytes: between two steps, and at most in a step with a switch and in one without."""

    rest: int
    switching: int
    plain: int


def peaks(begin: Callable[[], Run]) -> Measured:
    """Of three steps of a run that `begin` makes; the method's first switch is in the first."""
    with Live() as live:
        run = begin()
        live.restart()
        run.train_step(lambda: False)
        switching = live.peak
        run.train_step(lambda: False)
        live.restart()
        run.train_step(lambda: False)
        return Measured(live.now, switching, live.peak)


def main() -> None:
    """One rank, in this process, on this machine's CPU; prints `Measured` as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.live",
        description=__doc__,
        epilog="example: python -m benchmarks.live examples/galore.json",
    )
    parser.add_argument("spec", type=Path, help="a TrainingSpec of one process, as JSON")
    spec = TrainingSpec.model_validate_json(parser.parse_args().spec.read_text())
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory(prefix="stiefel-live-") as directory, distributed():
        rundir = RunDir(Path(directory))
        prepare(spec, rundir, 0, lambda _: None, lambda: False)
        found = peaks(lambda: Run(spec, rundir, lambda _: None))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
