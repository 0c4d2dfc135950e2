"""Reading checkpoints: the newest whole one, its values into a model, its moments into an engine."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.checkpoint.layout import FORMAT, STATE, digest, state_buffers
from trainer.checkpoint.place import Place
from trainer.checkpoint.rollback import record_of
from trainer.errors import CheckpointError
from trainer.zero import Shards

log = logging.getLogger("stiefel.trainer")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified, its small state read and its files in a directory of this machine."""

    url: str
    directory: Path
    step: int
    loss: float | None
    counts: dict[str, int]
    method: dict[str, Any]
    guard: dict[str, Any]
    files: dict[str, dict[str, Any]]


def newest(place: Place) -> Checkpoint | None:
    """The newest complete checkpoint whose files are what its checksums say.

    Raises CheckpointError when there are complete ones but none of them is undamaged.
    """
    return _first_good(place.complete_steps()[::-1], lambda step: read(place, step))


def newest_for_all(place: Place) -> Checkpoint | None:
    """`newest`, the same on every rank: they must not start from different steps. Collective.

    One rank a host fetches and verifies, and only what is good on all hosts is used.
    """
    steps: list[Any] = [place.complete_steps()[::-1] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(steps, src=0)

    def read_together(step: int) -> Checkpoint:
        damage = ""
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            try:
                read(place, step)
            except CheckpointError as error:
                damage = str(error)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, damage)
        if any(answers):
            raise CheckpointError(next(filter(None, answers)))
        return _state(place, step)

    return _first_good(steps[0], read_together)


def best(place: Place) -> Checkpoint:
    """The undamaged checkpoint with the lowest held-out loss. Raises CheckpointError where none has one."""
    found = [_state(place, step) for step in place.complete_steps()]
    known = sorted((c for c in found if c.loss is not None), key=lambda c: (c.loss or 0.0, -c.step))
    chosen = _first_good([c.step for c in known], lambda step: read(place, step))
    if chosen is None:
        raise CheckpointError(f"{place.url(0)}: no checkpoint beside it knows its held-out loss; take the newest")
    return chosen


def read(place: Place, step: int) -> Checkpoint:
    """The checkpoint of `step`, verified. Raises CheckpointError."""
    found = _state(place, step)
    place.fetch(step, list(found.files))
    for name, stated in found.files.items():
        file = found.directory / name
        if not file.is_file() or file.stat().st_size != stated["bytes"] or digest(file) != stated["sha256"]:
            place.release(step)
            raise CheckpointError(f"{found.url}/{name} is missing or damaged (its checksum does not match)")
    return found


def _first_good(steps: list[int], read_one: Callable[[int], Checkpoint]) -> Checkpoint | None:
    """Of `steps`, in the order of preference."""
    damage = []
    for step in steps:
        try:
            return read_one(step)
        except CheckpointError as error:
            log.warning("%s; the next best is used", error)
            damage.append(str(error))
    if damage:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(damage))
    return None


def _state(place: Place, step: int) -> Checkpoint:
    """What state.json says; the files are not looked at."""
    try:
        s = json.loads(place.read(step, STATE))
        if s["format"] != FORMAT:
            raise CheckpointError(f"{place.url(step)} has format {s['format']}, this version reads {FORMAT}")
        # Checkpoints of earlier versions know of no guard.
        guard = s.get("guard", {}) | (record_of(place, step) or {})
        directory = place.fetch(step, [])
        return Checkpoint(place.url(step), directory, s["step"], s["loss"], s["counts"], s["method"], guard, s["files"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place.url(step)}/{STATE} cannot be read: {error!r}") from error


class Tensors:
    """The tensors of a checkpoint by name, read one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._url = checkpoint.url
        self._file_of: dict[str, Any] = {}
        for name in sorted(checkpoint.files):
            try:
                file = safe_open(checkpoint.directory / name, framework="pt")
                self._file_of |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{checkpoint.url}/{name} cannot be read: {error}") from error

    @property
    def names(self) -> set[str]:
        """Of parameters and buffers; not of moments."""
        return {key for key in self._file_of if "|" not in key}

    def get(self, key: str) -> Tensor:
        if key not in self._file_of:
            raise CheckpointError(f"{self._url} lacks {key}: it does not fit this model")
        value: Tensor = self._file_of[key].get_tensor(key)
        return value

    # As a `trainer.weights.Source`:
    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        found = {key: self.get(name) for key, name in names.items()}
        for key, value in found.items():
            if value.shape != module.get_parameter(key).shape:
                raise CheckpointError(f"{self._url}: {names[key]} {tuple(value.shape)} does not fit this model")
        return found

    def restore_buffers(self, model: nn.Module) -> None:
        """Also sees to it that nothing in the checkpoint is left over. Before an engine is built around the model."""
        buffers = state_buffers(model)
        if foreign := sorted(self.names - {name for name, _ in model.named_parameters()} - set(buffers)):
            raise CheckpointError(f"{self._url}: {foreign[0]} does not fit this model")
        for name, buffer in buffers.items():
            value = self.get(name).to(buffer.dtype)
            if value.shape != buffer.shape:
                raise CheckpointError(f"{self._url}: {name} {tuple(value.shape)} does not fit this model")
            prefix, _, key = name.rpartition(".")
            model.get_submodule(prefix)._buffers[key] = value


def load_training_state(checkpoint: Checkpoint, model: nn.Module, shards: Shards) -> None:
    """Set masters, moments and counts inside an engine. Every rank reads every tensor that is trained."""
    tensors = Tensors(checkpoint)
    for name, parameter in model.named_parameters():
        if shards.has_master(parameter):
            shards.write(parameter, tensors.get(name).to(shards.device))
        for key in shards.moments_of(parameter):
            shards.write_moment(parameter, key, tensors.get(f"{name}|{key}").to(shards.device))
    for group, count in checkpoint.counts.items():
        shards.set_count(group, count)
