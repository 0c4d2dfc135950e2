"""Writing checkpoints while training goes on.

    begin    collective: every rank copies its share of the whole tensors to host memory      training stands still
    write    each rank by itself, in a thread: file, checksum, upload                         training goes on
    commit   collective, at the end of a later step: state.json, the events, then the marker  training stands still

A kill at any moment leaves the earlier checkpoints as they were: they are removed only after a commit.
"""

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.checkpoint.layout import FORMAT, STATE, digest, state_buffers
from trainer.checkpoint.place import Place
from trainer.checkpoint.retention import held, kept
from trainer.config import CheckpointSpec
from trainer.errors import InfrastructureError
from trainer.events import Checkpointed
from trainer.rundir import COMPLETE, RunDir
from trainer.zero import Shards, shape_of

log = logging.getLogger("stiefel.trainer")

_Described = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class _Pending:
    step: int
    state: dict[str, Any]
    future: "Future[_Described]"
    began: float
    stalled: float


class Writer:
    """At most one checkpoint is on its way. All methods but `is_written` are collective."""

    def __init__(self, place: Place, rundir: RunDir, wanted: CheckpointSpec, sync_events: Callable[[], None]) -> None:
        self._place, self._rundir, self._wanted, self._sync_events = place, rundir, wanted, sync_events
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for its commit; equal on all ranks."""
        return self._pending is not None

    def pending_before(self, step: int) -> bool:
        """Whether one of an earlier step does."""
        return self._pending is not None and self._pending.step < step

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of it is done, or has failed."""
        return self._pending is None or self._pending.future.done()

    def begin(
        self,
        model: nn.Module,
        shards: Shards,
        step: int,
        method: dict[str, Any],
        guard: dict[str, Any],
        loss: float | None,
    ) -> None:
        """Copy the state of `step`, whose held-out loss is `loss`, and write it in the background."""
        assert self._pending is None, "commit the one before first"
        began = time.perf_counter()
        if dist.get_rank() == 0:
            self._place.sweep()
            # What is complete of this very step is damaged, or it would not be trained again.
            self._place.remove(step)
        known = {"step": step, "loss": loss, "counts": shards.counts(), "method": method, "guard": guard}
        state = {"format": FORMAT} | known
        mine = _snapshot(model, shards)
        dist.barrier()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        future = thread.submit(self._write, step, mine)
        # The thread ends when the write has.
        thread.shutdown(wait=False)
        self._pending = _Pending(step, state, future, began, time.perf_counter() - began)

    def commit(self) -> Checkpointed:
        """Make it count, after waiting for its files where they are not written yet; then drop what is not kept.

        Raises InfrastructureError, on every rank, where a rank could not write its file: a later try may.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        began = time.perf_counter()
        files, bytes_written = self._collect(pending), 0
        if dist.get_rank() == 0:
            bytes_written = sum(file["bytes"] for file in files.values())
            state = json.dumps(pending.state | {"files": files}, indent=1).encode()
            self._place.write(pending.step, STATE, state)
            # Events of steps before a checkpoint are never reported again: they must be on the disk before it counts.
            self._sync_events()
            self._place.write(pending.step, COMPLETE, b"")
            # Amid high steps, those from before them may be needed to go back to.
            if not pending.state["guard"]["high"]:
                self._prune(pending.step)
        now = time.perf_counter()
        return Checkpointed(
            step=pending.step,
            path=self._place.url(pending.step),
            bytes=bytes_written,
            seconds=now - pending.began,
            stalled_seconds=pending.stalled + now - began,
            loss=pending.state["loss"],
        )

    def _write(self, step: int, mine: dict[str, Tensor]) -> _Described:
        file = self._place.staging(step) / f"rank-{dist.get_rank():02d}.safetensors"
        save_file(mine, file)
        described = {"bytes": file.stat().st_size, "sha256": digest(file)}
        self._place.store(step, file.name)
        return file.name, described

    def _collect(self, pending: _Pending) -> dict[str, Any]:
        answer: _Described | str
        try:
            answer = pending.future.result()
        except Exception as error:  # noqa: BLE001  (whatever it was, the other ranks have to hear of it)
            answer = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
        if failed := [text for text in answers if isinstance(text, str)]:
            url = self._place.url(pending.step)
            causes = "; ".join(failed)
            raise InfrastructureError(f"{url} could not be written: {causes}; free space or repair the place")
        return dict(answers)

    def _prune(self, step: int) -> None:
        losses: dict[int, float | None] = {}
        for other in self._place.complete_steps():
            if other > step:
                # Newer than this one can only be what was damaged and passed over at the start.
                self._place.remove(other)
                continue
            try:
                losses[other] = json.loads(self._place.read(other, STATE))["loss"]
            except (OSError, ValueError, KeyError):
                losses[other] = None  # damaged: nothing that could be the best
        try:
            needed = kept(losses, self._wanted) | held(self._rundir)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): no checkpoint is removed", self._rundir.held, error)
            return
        for other in set(losses) - needed:
            self._place.remove(other)


def _snapshot(model: nn.Module, shards: Shards) -> dict[str, Tensor]:
    """This rank's share of the whole tensors, copied to host memory: about as many bytes on each rank. Collective."""
    rank = dist.get_rank()
    loads = [0] * dist.get_world_size()
    mine: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        keys = shards.moments_of(parameter) if parameter.requires_grad else ()
        target = loads.index(min(loads))
        loads[target] += shape_of(parameter).numel() * (1 + len(keys))
        parts = {name: shards.read(parameter)}
        parts |= {f"{name}|{key}": shards.read_moment(parameter, key) for key in keys}
        if target == rank:
            mine |= {key: value.detach().cpu().contiguous() for key, value in parts.items()}
    if rank == 0:
        mine |= {name: buffer.detach().cpu().clone() for name, buffer in state_buffers(model).items()}
    return mine
