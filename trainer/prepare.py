"""What a run trains on, made once and put into the run directory, before the ranks meet; see `trainer.task`."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer import durable
from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.events import Event
from trainer.rundir import META, RunDir
from trainer.task import Making
from trainer.tasks import TASKS
from trainer.tokenizer import load_tokenizer, save_tokenizer

_SECONDS_BETWEEN_LOOKS = 0.2


def prepare(
    spec: TrainingSpec,
    rundir: RunDir,
    local_rank: int,
    emit: Callable[[Event], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Make the task's files in the run directory, unless they are there already. False when a stop was requested.

    The first rank of each host works, one host at a time: where they share the run directory, the others find it done.
    A host's other ranks look for the result, without a collective that could time out. (If the first fails, the
    launcher ends them.) Raises DataError when there is too little to train on, SpecError when what is there was made
    from another dataset or by another tokeniser.
    """
    # Named after the launcher, so that nobody takes an earlier attempt's for this one's.
    stopped = rundir.data / f"stopped-{socket.gethostname()}-{os.getppid()}"
    if local_rank != 0:
        while not (rundir.data / META).exists():
            if stopped.exists():
                return False
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return True
    rundir.data.mkdir(parents=True, exist_ok=True)
    with _alone(rundir.data_lock, stop_requested) as alone:
        if (rundir.data / META).exists():
            _check_same(spec, rundir)
            return _told(spec, rundir, emit)
        if alone and _make(Making(spec, rundir, load_tokenizer(spec.tokenizer), emit, stop_requested)):
            return _told(spec, rundir, emit)
    stopped.touch()
    return False


@contextmanager
def _alone(lock: Path, stop_requested: Callable[[], bool]) -> Iterator[bool]:
    """Hold `lock`; False when a stop was requested while somebody else held it. A killed holder has let go of it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _try_lock(descriptor)
        while not held and not stop_requested():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            held = _try_lock(descriptor)
        yield held
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(making: Making) -> bool:
    """False when a stop was requested, and nothing is there."""
    spec, rundir = making.spec, making.rundir
    facts = TASKS[spec.task].make(making)
    if facts is None:
        return False
    save_tokenizer(making.tokenizer, rundir.tokenizer)
    for path in [*rundir.tokenizer.iterdir(), rundir.tokenizer, rundir.root]:
        durable.sync(path)
    # Last: who finds it takes all that it speaks of for whole.
    durable.write(rundir.data / META, json.dumps(facts | {"made_from": _made_from(spec)}).encode())
    return True


def _told(spec: TrainingSpec, rundir: RunDir, emit: Callable[[Event], None]) -> bool:
    """True. At every start: who reads the events of one attempt shall find what it trains on."""
    for event in TASKS[spec.task].tell(spec, rundir.data):
        emit(event)
    return True


def digest(rundir: RunDir) -> str:
    """Of what is prepared: equal on hosts that read the same files with the same tokeniser."""
    meta = json.loads((rundir.data / META).read_text())
    return str(meta.get("sha256", meta["tokens"]))  # without: made before it was stored


def _made_from(spec: TrainingSpec) -> dict[str, Any]:
    """What the tokens depend on: what a task cuts out of them later may change between two attempts, this may not."""
    dataset = spec.dataset.model_dump(mode="json", exclude=TASKS[spec.task].later)
    return {"dataset": dataset, "tokenizer": spec.tokenizer}


def _check_same(spec: TrainingSpec, rundir: RunDir) -> None:
    made_from = json.loads((rundir.data / META).read_text())["made_from"]
    for field, wanted in _made_from(spec).items():
        if made_from[field] != wanted:
            raise SpecError(
                f"{field}: {rundir.data} was made from {made_from[field]}, not {wanted}; "
                "train in another run directory, or delete its data and checkpoints"
            )
