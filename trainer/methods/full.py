"""Full-rank training: AdamW on every parameter, as torch has it (Loshchilov and Hutter 2019, arXiv:1711.05101).

M ← β₁M + (1−β₁)G     V ← β₂V + (1−β₂)G²     W ← (1 − ηλ)W − η·M̂/(√V̂ + ε)
"""

from trainer.methods.base import Method


class Full(Method):
    """The baseline; everything is as `Method` has it."""
