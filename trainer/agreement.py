"""What the ranks make sure of once they have met: same spec, same tokens, one place for checkpoints."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from trainer import prepare
from trainer.checkpoint.place import Place, place_of
from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir

# A network file system may show a new file to another host a little later.
_SECONDS_TO_APPEAR = 10.0


def all_prepared(spec: TrainingSpec, rundir: RunDir, prepared: bool) -> bool:
    """Whether every rank has its tokens. Collective; raises SpecError on all ranks where they would train apart."""
    if not all(_gather(prepared)):
        return False
    if _one_host():
        return True
    where, mark = place_of(spec, rundir), f"seen-{secrets.token_hex(8)}"
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        where.write(0, mark, b"")
        said = [(socket.gethostname(), spec.model_dump(mode="json"), prepare.digest(rundir), mark)]
    dist.broadcast_object_list(said, src=0)
    problems = _gather(_problem(spec, rundir, where, *said[0]))
    if dist.get_rank() == 0:
        where.discard(0, mark)
    for problem in filter(None, problems):
        raise SpecError(problem)
    return True


def any_rank(flag: bool) -> bool:
    """Collective."""
    return any(_gather(flag))


def _gather(mine: Any) -> list[Any]:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _one_host() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def _problem(
    spec: TrainingSpec, rundir: RunDir, where: Place, first: str, its_spec: Any, its_data: str, mark: str
) -> str | None:
    here = f"rank {dist.get_rank()} on {socket.gethostname()}"
    theirs, ours = dict(_flat(its_spec)), dict(_flat(spec.model_dump(mode="json")))
    for field in theirs | ours:
        if theirs.get(field) != ours.get(field):
            return (
                f"{field}: {ours.get(field)!r} in {rundir.spec} of {here}, {theirs.get(field)!r} in that of rank 0 on "
                f"{first}; give every host the same spec.json"
            )
    if prepare.digest(rundir) != its_data:
        return (
            f"dataset: {here} has made other tokens of its files than rank 0 on {first}; give every host the same "
            f"files and tokeniser, or one run directory for all, and delete {rundir.data}"
        )
    if not _appears(where, mark):
        return (
            f"resources.hosts: checkpoints of {here} go to {where.url(0)}, which is not where those of rank 0 on "
            f"{first} go; mount the same directory on every host, or share the whole run directory"
        )
    return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of nested dictionaries, the field's name joined by dots."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def _appears(where: Place, mark: str) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        try:
            where.read(0, mark)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
