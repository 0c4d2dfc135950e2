"""The baselines that train both factors of a low-rank part by AdamW.

    lowrank   W_eff = B A                                       Kamalakara et al. 2022, arXiv:2209.13569
    lora      W_eff = W + (α/r) B A, W frozen                   Hu et al. 2022, arXiv:2106.09685
    dora      W_eff = g ⊙ (W + (α/r) B A) / ‖·‖_row             Liu et al. 2024, arXiv:2402.09353
    sltrain   W_eff = (α/r) B A + scatter(I, v)                 Han et al. 2024, arXiv:2406.02214

B starts at 0 and A as LoRA's code has it, but for lowrank, whose factors are Xavier's (LORO's initialisation: what
differs between the two is then the optimizer alone). Decay acts on the factors, as AdamW gives it, not on a frozen W;
not on DoRA's magnitudes either. Rates are η for all.
"""

from typing import Any

import torch
from torch import nn

from trainer.lowrank.adapted import Adapted
from trainer.lowrank.factored import FactoredLinear, MagnitudeLinear, SparseFactoredLinear, kaiming, xavier
from trainer.lowrank.switch import initial_generator
from trainer.methodconfig import RankedSettings, ScaledFactorsSettings, SLTrainConfig
from trainer.methods.base import Method
from trainer.zero import shape_of


class LowRank(Method):
    def make(self, linear: nn.Linear, name: str, index: int) -> Adapted:
        rows, columns = linear.weight.shape
        generator = initial_generator(self.spec.optimisation.seed, index)
        b, a = xavier(rows, self.rank, generator), xavier(self.rank, columns, generator)
        return FactoredLinear(linear, name, b, a, 1.0, keep_weight=False)

    @property
    def factor_settings(self) -> RankedSettings:
        assert isinstance(self.spec.method, RankedSettings)
        return self.spec.method

    @property
    def rank(self) -> int:
        assert self.factor_settings.rank is not None
        return self.factor_settings.rank

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        trained = [parameter for layer in self.layers for parameter in layer.trained()]
        common = {"rule": "adamw", "rate": 1.0}
        factors = [p for p in trained if len(shape_of(p)) == 2]
        extras = [p for p in trained if len(shape_of(p)) == 1]
        return [
            {"name": "factors", "params": factors, "weight_decay": self.decay} | common,
            {"name": "extras", "params": extras, "weight_decay": self.extra_decay} | common,
            *self.plain_groups(model, besides=trained),
        ]

    @property
    def extra_decay(self) -> float:
        """Decay of what a layer trains beside its factors."""
        return self.decay


class Lora(LowRank):
    def make(self, linear: nn.Linear, name: str, index: int) -> Adapted:
        rows, columns = linear.weight.shape
        generator = initial_generator(self.spec.optimisation.seed, index)
        b, a = torch.zeros(rows, self.rank), kaiming(self.rank, columns, generator)
        return self.make_from(linear, name, b, a, generator)

    def make_from(
        self, linear: nn.Linear, name: str, b: torch.Tensor, a: torch.Tensor, generator: torch.Generator
    ) -> Adapted:
        return FactoredLinear(linear, name, b, a, self.factor_scale, keep_weight=True)

    @property
    def factor_scale(self) -> float:
        assert isinstance(self.spec.method, ScaledFactorsSettings)
        return self.spec.method.alpha / self.rank


class Dora(Lora):
    def make_from(
        self, linear: nn.Linear, name: str, b: torch.Tensor, a: torch.Tensor, generator: torch.Generator
    ) -> Adapted:
        return MagnitudeLinear(linear, name, b, a, self.factor_scale)

    @property
    def extra_decay(self) -> float:
        return 0.0


class SLTrain(Lora):
    def make_from(
        self, linear: nn.Linear, name: str, b: torch.Tensor, a: torch.Tensor, generator: torch.Generator
    ) -> Adapted:
        assert isinstance(self.spec.method, SLTrainConfig)
        density = self.spec.method.density
        return SparseFactoredLinear(linear, name, b, a, self.factor_scale, density, generator)
