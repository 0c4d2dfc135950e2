"""Methods that freeze W, train a core in a subspace, and change the subspace every `period` steps.

With W frozen, the basis P (m, r) fixed and the core A trained from 0, ∂L/∂A = PᵀG: AdamW on A is Adam on the projected
gradient, and W_eff = s·W + P A follows the papers' trajectory exactly, provided that
- the scale α enters the core's learning rate, not the forward pass;
- decoupled decay acts on the whole of W_eff at η·λ, without α: on the core through its group, on W through s;
- a switch that needs the gradient uses the step's own.
(GoLore, arXiv:2410.11289, appendix D, calls it the ReLoRA-like implementation.) The same holds with entries of W in
the place of a basis.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.lowrank.probe import Give, each_gradient
from trainer.lowrank.switch import SwitchReport, switch
from trainer.methodconfig import GradientSettings, SubspaceSettings
from trainer.methods.base import Method, StepContext


class Subspace(Method):
    """A subclass says what a layer is (`make`) and what a switch does."""

    config: SubspaceSettings

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.method, SubspaceSettings)
        self.config = spec.method

    @abstractmethod
    def switch(self, context: StepContext) -> SwitchReport:
        """Give every layer its next subspace. Collective."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        cores = [layer.core for layer in self.layers]
        trained = [parameter for layer in self.layers for parameter in layer.trained()]
        alpha = self.config.alpha
        # The group's rate is η·α, and decay is rate × weight_decay: dividing by α leaves η·λ.
        group = {"name": "cores", "params": cores, "rule": self.config.optimizer, "rate": alpha}
        return [group | {"weight_decay": self.decay / alpha}, *self.plain_groups(model, besides=trained)]

    def before_step(self, context: StepContext) -> SwitchReport | None:
        if context.step % self.config.period:
            return None
        report = self.switch(context)
        if self.moments == "reset":
            context.shards.forget("cores", [layer.core for layer in self.layers])
        return report

    def after_step(self, context: StepContext) -> SwitchReport | None:
        for layer in self.layers:
            layer.scale *= 1.0 - context.learning_rate * self.decay
        return None

    @property
    def moments(self) -> str:
        """What happens to them at a switch. Methods without the setting keep what they can."""
        return getattr(self.config, "moments", "kept")


class ChosenSubspace(Subspace):
    """A subclass says how one layer's subspace is chosen, and whether the choice depends on the gradient."""

    @abstractmethod
    def choose(self, layer: Any, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        """The layer's new subspace, from its gradient (m, n) where one was asked for. May raise LinAlgError."""

    def needs_gradient(self, step: int) -> bool:
        """Whether the switch before the 0-based `step` asks for the step's own gradient."""
        return True

    def switch(self, context: StepContext) -> SwitchReport:
        def gradients(give: Give) -> None:
            assert isinstance(self.config, GradientSettings)
            at_once = self.config.gradients_at_once
            each_gradient(context.model, self.layers, context.micro_batches, at_once, give)

        seed, carry = self.spec.optimisation.seed, self.moments == "carried"
        asked = gradients if self.needs_gradient(context.step) else None
        return switch(self.layers, asked, self.choose, context.shards, seed, context.step, carry)
