"""What DeepSpeed keeps in files (`deepspeed.offload`, `offload_parameters`: nvme): where, and how to reach it.

At stage 3 only, and only what is worth a file: shards of parameters, and flat groups of masters and moments, of at
least a mebibyte each. Smaller ones stay in host memory, and so does the forward pass's copy of what is trained.

The traps that live here (DeepSpeed 0.19):
- A file's directory is emptied when its swapper is made. Models are sharded module by module, so all modules share one
  swapper (`trainer.engine.sharder`); runs share a disk, so each run has a directory of its own.
- Buffers are locked in memory and all as large as the largest shard, which is asked for in elements: by default two
  gigabytes, or too few.
- A swapped tensor is empty between its uses, and what is written into it while it is empty is lost.
"""

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.swap_tensor.utils import swap_out_tensors
from torch import Tensor

from trainer.config import DeepSpeedSpec, TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir

_FIELDS = ("offload", "offload_parameters")


def check_can_offload(spec: DeepSpeedSpec) -> None:
    """Raises SpecError where state or parameters are to be in files and this machine cannot do it.

    Asked before anything is built: DeepSpeed would fail in the middle, or wait for a compiler.
    """
    for field in _FIELDS:
        if getattr(spec, field) != "nvme":
            continue
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise SpecError(
                f"deepspeed.{field}: nvme needs DeepSpeed's async_io, which cannot be built on this machine; install "
                "libaio-dev, ninja and a C++ compiler, or use cpu"
            )
        directory = Path(spec.nvme_path or "")
        if not (directory.is_dir() and os.access(directory, os.W_OK)):
            raise SpecError(f"deepspeed.nvme_path: {str(directory)!r} is no directory that can be written to here")


@contextmanager
def own_directory(spec: TrainingSpec, rundir: RunDir, rank: int) -> Iterator[TrainingSpec]:
    """The spec with a directory for this rank of this run alone as `nvme_path`; removed at the end.

    Its name follows from the run's, so that what a killed process has left is removed by the next.
    """
    if "nvme" not in [getattr(spec.deepspeed, field) for field in _FIELDS]:
        yield spec
        return
    check_can_offload(spec.deepspeed)
    root = rundir.root.absolute()
    run = Path(spec.deepspeed.nvme_path or "") / f"stiefel-{root.name}-{zlib.crc32(str(root).encode()):08x}"
    own = run / f"rank{rank}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        yield spec.model_copy(update={"deepspeed": spec.deepspeed.model_copy(update={"nvme_path": str(own)})})
    finally:
        shutil.rmtree(own, ignore_errors=True)
        # Only the last rank of this host finds it empty.
        with suppress(OSError):
            run.rmdir()


@contextmanager
def shard_in_memory(parameter: Any, change: bool = False) -> Iterator[Tensor]:
    """This rank's shard of a stage-3 parameter, flat, for the time of the context; with `change` it is kept then."""
    shard = parameter.ds_tensor
    if shard.final_location != "nvme":
        yield shard.data
        return
    swapper = parameter.nvme_swapper
    if shard.status == PartitionedParamStatus.INFLIGHT:
        swapper.synchronize_reads()
    brought = shard.status == PartitionedParamStatus.NOT_AVAILABLE
    if brought:
        swapper.swap_in([parameter], async_op=False)
    yield shard.data
    if change:
        # Not the swapper's own `swap_out`, which gives the buffer away: on a single rank a gathered parameter is a view
        # of it, and a backward pass may be about to use that.
        swap_out_tensors(
            swapper.aio_write_handle, swapper._get_swap_buffers([parameter]), [swapper.get_path(parameter)]
        )
        swapper.aio_write_handle.wait()
    if brought:
        swapper.remove_partition_and_release_buffers([parameter])


def group_in_memory(optimizer: Any, index: int) -> Any:
    """A context in which flat group `index` of DeepSpeed's stage-3 optimizer, and its moments, are there to change."""
    if not optimizer._swappable_optimizer_subgroup(index):
        return nullcontext()
    return _swapped_in(optimizer, index)


@contextmanager
def _swapped_in(optimizer: Any, index: int) -> Iterator[None]:
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(index)
