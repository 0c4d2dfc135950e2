"""What a run trains on and is judged by: the seam between the loop and a task (pretrain, finetune, classify).

A task is three things. Its files are made once (`Make`, called by `trainer.prepare`, before the ranks meet); what it
gives to one rank while the run lasts is a `Task`; `trainer.tasks` has both by the task's name. A task's model comes
from `trainer.model`. The loop, the engine, the methods and the checkpoints know of none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.events import Event
from trainer.rundir import RunDir


@dataclass(frozen=True)
class Making:
    """What `Make` is called with. `tokenizer` is the spec's; what it has become is saved with the run afterwards."""

    spec: TrainingSpec
    rundir: RunDir
    tokenizer: PreTrainedTokenizerBase
    emit: Callable[[Event], None]
    stop_requested: Callable[[], bool]


# Writes files into rundir.data and returns what meta.json says of them, `sha256` (of all that is trained on) among it;
# None when a stop was requested. `trainer.prepare` adds `made_from` and writes meta.json, last.
Make = Callable[[Making], dict[str, Any] | None]


@dataclass(frozen=True)
class Measured:
    """A model on what is held out: mean loss over `count` sequences or examples, and a task's own figures."""

    loss: float
    count: int
    accuracy: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Task(Protocol):
    """The prepared data of a run, on one rank. What it gives is a function of the spec, the files and the step alone:
    the same on any number of ranks, and the cursor of a resumed run is its step.
    """

    training_tokens: int  # in all that is trained on, once through
    tokens_per_step: int  # of an ordinary one, on average

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before the 0-based `step` read, padding left out."""

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of what the 0-based `step` averages: as many batches on every rank, at most as many as the
        engine was configured for. A large switch (GoLore's ℬ) reads several global batches (`spec.batches_before`).
        """

    def check(self, model: Any) -> None:
        """Once, when the model is ready: whatever the task asks of it. Collective; raises SpecError on all ranks."""

    def evaluate(self, model: Any) -> Measured | None:
        """On what is held out, shared out over the ranks, without gradients; None where there is nothing. Collective:
        every rank makes as many forward passes. `model` is the module inside the engine, in eval mode.
        """
