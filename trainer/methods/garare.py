"""GaRare: gradient random projection (Liu et al. 2025, ICLR), and Flora (Hao et al. 2024, arXiv:2402.03293).

    every τ steps   P (m, r) Gaussian, from (seed, layer, number of the switch), never stored
    R = PᵀG         M, V of R as in Adam         W ← (1 − ηλ)W − ηα·U·M̂/(√V̂ + ε)

GaRare: P always on the left, P_ij ~ N(0, 1/m), so that PᵀP ≈ I; U = P, or U = P(PᵀP)⁻¹. The published memory is
reproduced by the left side alone. Moments kept at a switch. Flora: P_ij ~ N(0, 1/r), so that E[PPᵀ] = I, on the smaller
side; the first moment carried at a switch, M ← P_newᵀ(P_old M), the second kept (carried, it could become negative).

Adam divides the scale of Pᵀ out of N again; the scale of U stays in the step, beside α.
"""

from typing import Any

from torch import nn

from trainer.errors import SpecError
from trainer.lowrank.projected import side_of
from trainer.lowrank.seeded import SeededLinear
from trainer.lowrank.switch import SwitchReport, renew_seeded
from trainer.methodcheck import pinv_problem
from trainer.methods.base import StepContext
from trainer.methods.subspace import Subspace


class GaRare(Subspace):
    config: Any

    def make(self, linear: nn.Linear, name: str, index: int) -> SeededLinear:
        config, seed = self.config, self.spec.optimisation.seed
        rows = linear.weight.shape[0]
        deviation = rows**-0.5
        pinv = config.back_projection == "pinv"
        if pinv and config.rank > rows // 2:
            raise SpecError(f"method.rank: {pinv_problem(config.rank, name, rows)}")
        return SeededLinear(linear, name, "left", config.rank, deviation, pinv, seed, index)

    def switch(self, context: StepContext) -> SwitchReport:
        return renew_seeded(self.layers, context.shards, context.step, carry=self.moments == "carried")


class Flora(GaRare):
    def make(self, linear: nn.Linear, name: str, index: int) -> SeededLinear:
        config, seed = self.config, self.spec.optimisation.seed
        side = side_of(*linear.weight.shape)
        return SeededLinear(linear, name, side, config.rank, config.rank**-0.5, False, seed, index)
