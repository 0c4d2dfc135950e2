"""What a method is to the training loop: four moments at which it may act, and the state it keeps."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.config import TrainingSpec
from trainer.lowrank.switch import SwitchReport
from trainer.zero import Shards


@dataclass(frozen=True)
class StepContext:
    """What a method may use around one step. `step` is 0-based: updates done so far."""

    step: int
    learning_rate: float
    model: nn.Module
    shards: Shards
    micro_batches: list[Tensor]


class Method:
    """Trains every parameter and does nothing in between, until a subclass says otherwise."""

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec

    def attach(self, model: nn.Module) -> None:
        """Change the model: replace modules, decide what is trained. Before the engine is built, once."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for torch.optim, each with `rate`: its learning rate as a multiple of η.

        Matrices decay, norms and biases do not.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        return self.plain_groups(trained)

    def plain_groups(self, trained: list[nn.Parameter]) -> list[dict[str, Any]]:
        decay = self.spec.optimisation.weight_decay
        return [
            {"params": [p for p in trained if p.ndim >= 2], "rate": 1.0, "weight_decay": decay},
            {"params": [p for p in trained if p.ndim < 2], "rate": 1.0, "weight_decay": 0.0},
        ]

    def before_step(self, context: StepContext) -> SwitchReport | None:
        """Before the step's forward pass; on all ranks."""
        return None

    def after_step(self, context: StepContext) -> None:
        """After the optimizer's update; on all ranks."""

    def state(self) -> dict[str, Any]:
        """Whatever is not a parameter or a moment of the model and is needed to resume; JSON values only."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `attach`."""

    def plain_modules(self) -> dict[str, nn.Linear]:
        """For export: by name, the plain linear module that each replaced one stands for, merged.

        Called on a model that is whole in one process.
        """
        return {}
