"""Checkpoints that belong to the model and not to the engine that wrote them.

    step-00000200/
      rank-00.safetensors …  whole tensors, shared out over the ranks that wrote: `NAME` (fp32 master, frozen value, or
                             buffer), `NAME|exp_avg` and what other moments a trained parameter has
      state.json             step, each group's count of updates, the method's own state, sizes and SHA-256 of the
                             files above
      COMPLETE               written last; a directory without it does not count

Nothing in it depends on the number of ranks or the ZeRO stage, and nothing is a pickle. DeepSpeed's own checkpoints are
both; see docs/decisions/0003-own-checkpoints.md.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.rundir import COMPLETE, RunDir
from trainer.zero import Shards

log = logging.getLogger("stiefel.trainer")

_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its small state read."""

    path: Path
    step: int
    counts: dict[str, int]
    method: dict[str, Any]
    files: dict[str, dict[str, Any]]


def save(rundir: RunDir, model: nn.Module, shards: Shards, step: int, method_state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of `step` and drop all but the newest `keep`. Collective; returns when it is whole.

    A kill at any moment leaves the earlier checkpoints as they were.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = rundir.checkpoint(step)
    unfinished = final.with_suffix(".tmp")
    if rank == 0:
        _sweep(rundir)
        unfinished.mkdir(parents=True)
    dist.barrier()

    mine: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parts = {name: shards.read(parameter)}
        if parameter.requires_grad:
            parts |= {f"{name}|{key}": shards.read_moment(parameter, key) for key in shards.moments_of(parameter)}
        if index % world == rank:
            mine |= {key: value.detach().cpu().contiguous() for key, value in parts.items()}
    if rank == 0:
        mine |= {name: buffer.detach().cpu().contiguous() for name, buffer in _buffers(model).items()}
    file = unfinished / f"rank-{rank:02d}.safetensors"
    save_file(mine, file)
    _sync(file)
    described: list[Any] = [None] * world
    dist.all_gather_object(described, (file.name, {"bytes": file.stat().st_size, "sha256": _digest(file)}))

    if rank == 0:
        state = {"step": step, "counts": shards.counts(), "method": method_state, "files": dict(described)}
        (unfinished / _STATE).write_text(json.dumps(state, indent=1))
        _sync(unfinished / _STATE)
        if final.exists():
            shutil.rmtree(final)
        (unfinished / COMPLETE).touch()
        _sync(unfinished)
        unfinished.rename(final)
        _sync(final.parent)
        complete = rundir.complete_checkpoints()
        # Newer than this one can only be what was damaged and passed over at the start.
        for path in (*complete[: max(0, complete.index(final) + 1 - keep)], *complete[complete.index(final) + 1 :]):
            (path / COMPLETE).unlink()
            shutil.rmtree(path)
    dist.barrier()
    return final


def _sweep(rundir: RunDir) -> None:
    """Remove what a killed writer or remover has left."""
    complete = rundir.complete_checkpoints()
    for path in rundir.checkpoints.glob("step-*"):
        if path not in complete:
            shutil.rmtree(path)


def newest(rundir: RunDir) -> Checkpoint | None:
    """The newest complete checkpoint whose files are what its checksums say.

    Raises CheckpointError when there are complete ones but none of them is undamaged.
    """
    damage = []
    for path in reversed(rundir.complete_checkpoints()):
        try:
            return read(path)
        except CheckpointError as error:
            log.warning("%s; the one before it is used", error)
            damage.append(str(error))
    if damage:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(damage))
    return None


def newest_for_all(rundir: RunDir) -> Checkpoint | None:
    """`newest`, as rank 0 sees it, on every rank: they must not start from different steps. Collective."""
    answer: list[Checkpoint | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = newest(rundir)
        except CheckpointError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], CheckpointError):
        raise answer[0]
    # As this rank's host names it: hosts may have the shared directory in different places.
    return answer[0] and replace(answer[0], path=rundir.checkpoint(answer[0].step))


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`, verified. Raises CheckpointError."""
    try:
        state = json.loads((path / _STATE).read_text())
        checkpoint = Checkpoint(path, state["step"], state["counts"], state["method"], state["files"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / _STATE} cannot be read: {error}") from error
    for name, stated in checkpoint.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != stated["bytes"] or _digest(file) != stated["sha256"]:
            raise CheckpointError(f"{file} is missing or damaged (its checksum does not match)")
    return checkpoint


def load_values(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Set every parameter and buffer of a model that is whole in this process, before an engine is built around it."""
    parameters: dict[str, Tensor] = dict(model.named_parameters()) | _buffers(model)
    seen = set()
    with torch.no_grad():
        for name, value in _tensors(checkpoint):
            if "|" not in name:
                if name not in parameters or parameters[name].shape != value.shape:
                    raise CheckpointError(f"{checkpoint.path}: {name} {tuple(value.shape)} does not fit this model")
                parameters[name].copy_(value)
                seen.add(name)
    if missing := sorted(set(parameters) - seen):
        raise CheckpointError(f"{checkpoint.path} lacks {missing[0]} and {len(missing) - 1} more parameters")


def load_training_state(checkpoint: Checkpoint, model: nn.Module, shards: Shards) -> None:
    """Set masters, moments and counts inside an engine. Every rank reads every tensor that is trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, value in _tensors(checkpoint):
        name, _, moment = key.partition("|")
        if name in parameters:
            value = value.to(parameters[name].device)
            if moment:
                shards.write_moment(parameters[name], moment, value)
            else:
                shards.write(parameters[name], value)
    for group, count in checkpoint.counts.items():
        shards.set_count(group, count)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, not rotary tables and their like. Equal on all ranks, at any stage."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def total_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(checkpoint.files):
        try:
            with safe_open(checkpoint.path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dictionary: it has no iterator)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.path / name} cannot be read: {error}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
