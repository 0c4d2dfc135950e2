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
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.lowrank.adapted import OnModule, leave
from trainer.lowrank.inbackward import SwitchInBackward
from trainer.lowrank.probe import Give, each_gradient
from trainer.lowrank.switch import Gradients, SwitchReport, switch
from trainer.methodconfig import GradientSettings, SubspaceSettings
from trainer.methods.base import Method, StepContext


class Subspace(Method):
    """A subclass says what a layer is (`make`) and what a switch does."""

    config: SubspaceSettings

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.method, SubspaceSettings)
        self.config = spec.method

    def attach(self, model: nn.Module, fill: OnModule = leave, done: OnModule = leave) -> None:
        super().attach(model, fill, done)
        for layer in self.layers:
            layer.merged = self.spec.optimisation.form == "merged"

    @abstractmethod
    def switch(self, context: StepContext) -> SwitchReport | None:
        """Give every layer its next subspace, or see to it that the step does. Collective."""

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
        if self.moments == "reset":
            context.shards.forget("cores", [layer.core for layer in self.layers])
        return self.switch(context)

    def after_step(self, context: StepContext) -> SwitchReport | None:
        keep = 1.0 - context.learning_rate * self.decay
        for layer in self.layers:
            if layer.merged:
                layer.absorb(context.shards, context.step, keep)
            else:
                layer.scale *= keep
        return None

    @property
    def moments(self) -> str:
        """What happens to them at a switch. Methods without the setting keep what they can."""
        return getattr(self.config, "moments", "kept")


class ChosenSubspace(Subspace):
    """A subclass says how one layer's subspace is chosen, and whether the choice depends on the gradient."""

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__(spec)
        # A switch that this step's backward pass makes, or that its forward pass has led to.
        self._switching: SwitchInBackward | None = None
        self._probed: SwitchReport | None = None

    @abstractmethod
    def choose(self, layer: Any, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        """The layer's new subspace, from its gradient (m, n) where one was asked for. May raise LinAlgError."""

    def needs_gradient(self, step: int) -> bool:
        """Whether the switch before the 0-based `step` asks for the step's own gradient."""
        return True

    def switch(self, context: StepContext) -> SwitchReport | None:
        if not self.needs_gradient(context.step):
            return self._switch_by(None, context)
        merged = all(layer.merged for layer in self.layers)
        if merged and dist.get_world_size() == len(context.micro_batches) == 1:
            for layer in self.layers:
                layer.calls = 0
            arguments = (self.layers, self.choose, context.shards, self.spec.optimisation.seed, context.step)
            self._switching = SwitchInBackward(*arguments, carry=self.moments == "carried")
            return None
        return self._switch_by_probe(context)

    def after_forward(self, context: StepContext) -> None:
        if self._switching is None:
            return
        if all(layer.calls <= 1 for layer in self.layers):
            self._switching.arm()
        else:
            # A layer's gradient comes in parts, and a basis is chosen from their sum.
            self._switching, self._probed = None, self._switch_by_probe(context)

    def after_step(self, context: StepContext) -> SwitchReport | None:
        super().after_step(context)
        report = self._switching.report() if self._switching else self._probed
        self._switching = self._probed = None
        return report

    def _switch_by_probe(self, context: StepContext) -> SwitchReport:
        def gradients(give: Give) -> None:
            assert isinstance(self.config, GradientSettings)
            at_once = self.config.gradients_at_once
            each_gradient(context.model, self.layers, context.micro_batches, at_once, give)

        return self._switch_by(gradients, context)

    def _switch_by(self, gradients: Gradients | None, context: StepContext) -> SwitchReport:
        seed, carry = self.spec.optimisation.seed, self.moments == "carried"
        return switch(self.layers, gradients, self.choose, context.shards, seed, context.step, carry)
