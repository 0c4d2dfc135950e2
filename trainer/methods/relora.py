"""ReLoRA: high-rank training through low-rank updates (Lialin et al. 2024, arXiv:2307.05695).

    every τ steps   W ← W + (α/r)·B A     A ← a new draw     B ← 0     moments pruned at random     η warmed up again

`prune` of the entries of each factor lose their moments (0.999 in the paper, its section 3); Adam's count runs on. One
mask serves both moments: an entry that kept the first and lost the second would move by η·M̂/ε. The paper starts with a
few thousand steps of full-rank training: train with `full`, export, and name the export as this job's model.
"""

import time

import torch

from trainer.lowrank.factored import FactoredLinear, kaiming
from trainer.lowrank.switch import SwitchReport, generator_for
from trainer.methodconfig import ReloraConfig
from trainer.methods.base import StepContext
from trainer.methods.factors import Lora
from trainer.zero import shape_of


class Relora(Lora):
    @property
    def config(self) -> ReloraConfig:
        assert isinstance(self.spec.method, ReloraConfig)
        return self.spec.method

    def rate_factor(self, step: int) -> float:
        period, warmup = self.config.period, self.config.restart_warmup
        return 1.0 if step < period or not warmup else min(1.0, (step % period + 1) / warmup)

    def before_step(self, context: StepContext) -> SwitchReport | None:
        if context.step == 0 or context.step % self.config.period:
            return None
        began = time.perf_counter()
        for index, layer in enumerate(self.layers):
            generator = generator_for(self.spec.optimisation.seed, context.step, index)
            self._restart(layer, context, generator)
        return SwitchReport(time.perf_counter() - began, None, 0)

    def _restart(self, layer: FactoredLinear, context: StepContext, generator: torch.Generator) -> None:
        """Collective; every rank draws the same numbers."""
        shards = context.shards
        assert layer.weight is not None
        layer.write_frozen(layer.weight, layer.effective(shards.read), shards, context.step)
        shards.write(layer.B, torch.zeros(shape_of(layer.B), device=shards.device))
        shards.write(layer.A, kaiming(self.rank, layer.columns, generator).to(shards.device))
        for parameter in (layer.B, layer.A):
            survives = torch.rand(shape_of(parameter), generator=generator) >= self.config.prune
            for key in shards.moments_of(parameter):
                moment = shards.read_moment(parameter, key)
                shards.write_moment(parameter, key, moment * survives.to(moment))
