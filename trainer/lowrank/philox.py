"""Random numbers that are a function of their place: the same on every rank, device and day, and never stored.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer arithmetic, and Gaussians
from it by table and sum, in operations that IEEE 754 fixes to the last bit: a logarithm's is a matter of the device.
(The table has logarithms behind it; it is made on the CPU, in float64, and rounded.)
"""

from functools import cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]) -> Tensor:
    """(N, 4) int64 holding unsigned 32-bit numbers, for N counters of four words; a word may be one for all."""
    c0, c1, c2, c3 = _words(counter)
    k0, k1 = key
    for _ in range(10):
        # Products of 32-bit words overflow int64 into its sign, which the mask after the shift removes.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _words(counter: tuple[Tensor | int, ...]) -> list[Tensor]:
    """The counters' words, of one shape, on one device."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    # Filled on the device: a copy from the host would wait for it.
    words = [w if isinstance(w, Tensor) else torch.full((), w, dtype=torch.int64, device=device) for w in counter]
    longest = max(words, key=Tensor.numel)
    return [word.expand(longest.shape) for word in words]


@cache
def _quantiles(device: torch.device) -> Tensor:
    """(65536,) float32: the middles of as many equally likely parts of a Gaussian, scaled to a variance of ½."""
    middles = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    half: Tensor = middles / middles.square().mean().sqrt() * 0.5**0.5
    return half.float().to(device)


def gaussian(rows: int, columns: int, seed: int, stream: int, epoch: int, device: torch.device) -> Tensor:
    """(rows, columns), float32, mean 0, variance 1, of the numbers that (seed, stream, epoch) names.

    Each is the sum of two draws from 65536 quantiles: 2³² values, reaching to 6 standard deviations.
    """
    total = rows * columns
    index = torch.arange((total + 3) // 4, device=device)
    words = philox((index & _MASK, index >> 32, stream, epoch), (seed & _MASK, seed >> 32 & _MASK)).flatten()[:total]
    table = _quantiles(device)
    return (table[words & 0xFFFF] + table[words >> 16]).view(rows, columns)
