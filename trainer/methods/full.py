"""Full-rank training: AdamW on every parameter, as torch has it (Loshchilov and Hutter 2019, arXiv:1711.05101).

M ← β₁M + (1−β₁)G     V ← β₂V + (1−β₂)G²     W ← (1 − ηλ)W − η·M̂/(√V̂ + ε)

or, for the matrices, momentum SGD (GoLore, arXiv:2410.11289, algorithm 1): W ← (1 − ηλ)W − η·M.
"""

from typing import Any

from torch import nn

from trainer.methodconfig import FullConfig
from trainer.methods.base import Method


class Full(Method):
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        config = self.spec.method
        assert isinstance(config, FullConfig)
        matrices, vectors = self.plain_groups(model)
        return [matrices | {"rule": config.optimizer}, vectors]
