"""What a method is to the training loop: a few moments at which it may act, and the state it keeps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.heads import head_parameters
from trainer.lowrank.adapted import Adapted, OnModule, leave, replace_targets
from trainer.lowrank.switch import SwitchReport
from trainer.methodconfig import RankedSettings, TargetedSettings
from trainer.zero import Shards, shape_of


@dataclass(frozen=True)
class StepContext:
    """What a method may use around one step. `step` is 0-based: updates done so far. `learning_rate` is its η."""

    step: int
    learning_rate: float
    model: nn.Module
    shards: Shards
    micro_batches: list[Batch]


class Method:
    """Trains every parameter and does nothing in between, until a subclass says otherwise.

    A method that replaces modules puts the new ones into `layers`, in the model's order.
    """

    layers: list[Any]

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec
        self.layers = []

    @property
    def decay(self) -> float:
        """λ."""
        return self.spec.optimisation.weight_decay

    def attach(self, model: nn.Module, fill: OnModule = leave, done: OnModule = leave) -> None:
        """Change the model: replace the targets, decide what is trained. Before the engine is built, once.

        The model may be a structure without values: `fill` is called with each module before it is replaced, `done`
        with what has taken its place.
        """
        self.look_at(model)
        head = {id(parameter) for parameter in head_parameters(model).values()} if self.has_head else set()
        if self.spec.optimisation.others == "frozen":
            # Before the targets are replaced: what takes their place brings parameters of its own.
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in head)
        settings = self.spec.method
        if isinstance(settings, TargetedSettings):
            rank = settings.rank if isinstance(settings, RankedSettings) else None
            self.layers = replace_targets(model, settings.targets, self.make, rank, fill, done, besides=head)
        if self.spec.optimisation.merge == "stochastic":
            for layer in self.layers:
                layer.rounding_seed = self.spec.optimisation.seed

    @property
    def has_head(self) -> bool:
        """Whether the model is a classifier: its head is trained in full, whatever the method and its targets."""
        return self.spec.task == "classify"

    def keep_masters(self, shards: Shards) -> None:
        """Where the run wants frozen weights in fp32 too. Once, after the engine is built. Collective."""
        if self.spec.optimisation.merge == "fp32":
            device = torch.device("cpu") if self.spec.deepspeed.offload != "none" else shards.device
            for layer in self.layers:
                shards.keep_master(layer.weight, device)

    def look_at(self, model: nn.Module) -> None:
        """Learn of the model's configuration what the method needs. Raises SpecError where it is missing."""

    def make(self, linear: nn.Linear, name: str, index: int) -> Adapted:
        """What takes the place of the `index`-th target."""
        raise NotImplementedError

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for `trainer.optimizer.Rules`: each with `name`, `rule`, `weight_decay`, and `rate`, its learning rate
        as a multiple of η. Empty ones are left out by the caller.
        """
        return self.plain_groups(model)

    def plain_groups(self, model: nn.Module, besides: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
        """AdamW for all that is trained and in no other group, at η or at the others' own rate.

        Matrices decay, norms and biases do not.
        """
        taken = {id(p) for p in besides}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        eta, own = self.spec.optimisation.learning_rate, self.spec.optimisation.others_learning_rate
        assert eta is not None
        common = {"rule": "adamw", "rate": 1.0 if own is None else own / eta}
        matrices = [p for p in trained if len(shape_of(p)) >= 2]
        vectors = [p for p in trained if len(shape_of(p)) < 2]
        return [
            {"name": "matrices", "params": matrices, "weight_decay": self.decay} | common,
            {"name": "vectors", "params": vectors, "weight_decay": 0.0} | common,
        ]

    def rate_factor(self, step: int) -> float:
        """What η of the 0-based `step` is multiplied by, for all parameters: a warm-up of the method's own."""
        return 1.0

    def before_step(self, context: StepContext) -> SwitchReport | None:
        """Before the step's forward pass; on all ranks."""
        return None

    def after_forward(self, context: StepContext) -> None:
        """Between a micro-batch's forward pass and its backward pass; on all ranks."""

    def after_step(self, context: StepContext) -> SwitchReport | None:
        """After the optimizer's update; on all ranks."""
        return None

    def state(self) -> dict[str, Any]:
        """Whatever is not a parameter, a buffer or a moment and is needed to resume; JSON values only."""
        return {layer.name: layer.state() for layer in self.layers}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `attach`."""
        for layer in self.layers:
            layer.load_state(state[layer.name])
