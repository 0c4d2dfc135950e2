"""GaSare and GoSare: sparse subspaces (He et al. 2024, GoLore, arXiv:2410.11289, appendix C, algorithm 5).

    every τ steps   S = the k entries of largest |G| (GaSare), or k uniformly random ones (GoSare)
    R = S⊙G         M ← β₁ S⊙M + (1−β₁)R     V ← β₂ S⊙V + (1−β₂)R²     W ← (1 − ηλ)W − ηα·S⊙M̂/(√V̂ + ε)

Kept as k sorted indices and k values. At a switch the moments of entries in both sets stay, those of new ones are 0;
Adam's count runs on, as in the algorithm. Of entries of equal |G| the first in the flattened matrix are taken.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.lowrank.entries import EntriesLinear, largest_entries
from trainer.methods.subspace import ChosenSubspace


class GoSare(ChosenSubspace):
    config: Any

    def make(self, linear: nn.Linear, name: str, index: int) -> EntriesLinear:
        return EntriesLinear(linear, name, self.config.density)

    def needs_gradient(self, step: int) -> bool:
        return False

    def choose(self, layer: EntriesLinear, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        return layer.fallback(generator)


class GaSare(GoSare):
    def needs_gradient(self, step: int) -> bool:
        return True

    def choose(self, layer: EntriesLinear, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        assert gradient is not None
        return largest_entries(gradient, layer.count)
