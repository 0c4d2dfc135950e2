"""Tensors that DeepSpeed keeps in files between their uses: how to bring them in, and what was changed out again.

At stage 3 only, and only what is worth a file: shards of parameters, and flat groups of masters and moments, of at
least a mebibyte each. Smaller ones stay in host memory, and so does the forward pass's copy of what is trained.

The traps that live here (DeepSpeed 0.19):
- A tensor is empty between its uses, or has a single element, and what is written into it then is lost.
- Buffers are few. On a single rank a gathered parameter is a view of one, so it must not be given away before the
  parameter is released.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.swap_tensor.utils import swap_out_tensors
from torch import Tensor


@contextmanager
def shard_in_memory(parameter: Any, change: bool = False) -> Iterator[Tensor]:
    """This rank's shard of a stage-3 parameter, flat, while the context lasts; with `change` what is written stays."""
    shard = parameter.ds_tensor
    if shard.final_location != "nvme":
        yield shard.data
        return
    swapper = parameter.nvme_swapper
    brought = shard.status == PartitionedParamStatus.NOT_AVAILABLE
    if brought:
        swapper.swap_in([parameter], async_op=False)
    try:
        yield shard.data
        if change:
            # Not the swapper's own `swap_out`, which gives the buffer away.
            swap_out_tensors(
                swapper.aio_write_handle, swapper._get_swap_buffers([parameter]), swapper._get_swap_paths([parameter])
            )
            swapper.aio_write_handle.wait()
    finally:
        if brought:
            swapper.remove_partition_and_release_buffers([parameter])


def group_in_memory(optimizer: Any, index: int) -> Any:
    """A context in which flat group `index` of DeepSpeed's optimizer, and its moments, are there to change."""
    in_file = getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(index)
    return _swapped_in(optimizer, index) if in_file else nullcontext()


@contextmanager
def _swapped_in(optimizer: Any, index: int) -> Iterator[None]:
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(index)
