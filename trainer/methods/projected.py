"""Methods that train a core against a fixed basis and change the basis every `period` steps (GaLore's family).

With W frozen, the basis P (m, r) fixed and the core A trained from 0, ∂L/∂A = PᵀG: AdamW on A is Adam on the projected
gradient, and W_eff = s·W + P A follows the papers' trajectory exactly, provided that
- the scale α enters the core's learning rate, not the forward pass;
- decoupled decay acts on the whole of W_eff at η·λ, without α: on the core through its group, on W through s;
- a switch that needs the gradient uses the step's own.
(GoLore, arXiv:2410.11289, appendix D, calls it the ReLoRA-like implementation.)
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.lowrank.linear import LowRankLinear, replace_targets
from trainer.lowrank.probe import full_gradients
from trainer.lowrank.switch import SwitchReport, switch
from trainer.methodconfig import GaLoreConfig
from trainer.methods.base import Method, StepContext


class Projected(Method):
    """A subclass says how a basis is chosen."""

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.method, GaLoreConfig)
        self.config = spec.method
        self.layers: list[LowRankLinear] = []

    @abstractmethod
    def choose(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """An orthonormal basis (m, r) of the left space of `gradient` (m, n). May raise LinAlgError."""

    def attach(self, model: nn.Module) -> None:
        self.layers = replace_targets(model, self.config.targets, self.config.rank)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        cores = [layer.core for layer in self.layers]
        taken = {id(core) for core in cores}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        alpha = self.config.alpha
        # The group's rate is η·α, and AdamW decays by rate × decay: dividing by α leaves η·λ.
        decay = self.spec.optimisation.weight_decay / alpha
        return [{"params": cores, "rate": alpha, "weight_decay": decay}, *self.plain_groups(others)]

    def before_step(self, context: StepContext) -> SwitchReport | None:
        if context.step % self.config.period:
            return None
        gradients = full_gradients(context.model, self.layers, context.micro_batches)
        seed = self.spec.optimisation.seed
        return switch(self.layers, gradients, self.choose, context.shards, seed, context.step)

    def after_step(self, context: StepContext) -> None:
        for layer in self.layers:
            layer.scale *= 1.0 - context.learning_rate * self.spec.optimisation.weight_decay

    def state(self) -> dict[str, Any]:
        return {"scale": {layer.name: layer.scale for layer in self.layers}}

    def load_state(self, state: dict[str, Any]) -> None:
        for layer in self.layers:
            layer.scale = state["scale"][layer.name]

    def plain_modules(self) -> dict[str, nn.Linear]:
        plain = {}
        for layer in self.layers:
            rows, columns = layer.weight.shape
            linear = nn.Linear(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(layer.weight.float() * layer.scale + layer.B.float() @ layer.A.float())
                if layer.bias is not None:
                    linear.bias.copy_(layer.bias)
            plain[layer.name] = linear
        return plain
