"""Rounding to fewer digits at random, so that what is added up in small pieces is right on average.

A number between two neighbours a < b of the narrow type becomes b with probability (x − a)/(b − a), else a: rounded to
nearest, a change below half a unit in the last place would be lost at every merge.
"""

import torch
from torch import Tensor

from trainer.lowrank.philox import philox

_AT_ONCE = 2**22


def stochastic_bf16(value: Tensor, seed: int, stream: int, draw: int) -> Tensor:
    """float32 → bfloat16, of the shape of `value`. The numbers are a function of (seed, stream, draw): equal on all
    ranks and devices. What bfloat16 can represent stays as it is."""
    flat = value.detach().float().reshape(-1)
    rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)
    for start in range(0, flat.numel(), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        # bfloat16 is the upper half of float32: a random lower half is added, and what carries over rounds up. In
        # magnitude, because the sign is a bit of its own. Infinities and NaNs have no lower half to be added to.
        bits = part.contiguous().view(torch.int32)
        carried = torch.where(part.isfinite(), bits + _random_halves(start, part, seed, stream, draw), bits)
        rounded[start : start + _AT_ONCE] = (carried & -0x10000).view(torch.float32).to(torch.bfloat16)
    return rounded.view(value.shape)


def _random_halves(start: int, like: Tensor, seed: int, stream: int, draw: int) -> Tensor:
    """Uniform in 0 … 65535, int32: eight of each counter."""
    count = like.numel()
    index = torch.arange(start // 8, start // 8 + (count + 7) // 8, device=like.device)
    words = philox((index & 0xFFFFFFFF, index >> 32, stream, draw), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()[:count]
    return halves.int()
