"""The model that is trained: a structure, filled and changed by the method one module after the other.

What `sharding` makes of the empty model is called with each module as soon as it has its values, and may shard it:
then no rank ever holds more of the model whole than one module, where the model allows it
(`trainer.model.fills_by_module`).
"""

from collections.abc import Callable
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.checkpoint.reading import Checkpoint, Tensors
from trainer.config import TrainingSpec
from trainer.lowrank.adapted import OnModule, leave
from trainer.methods.base import Method
from trainer.model import in_order, structure
from trainer.weights import Filler


def assemble(
    spec: TrainingSpec,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    resumed: Checkpoint | None = None,
    sharding: Callable[[Any], OnModule] = lambda model: leave,
) -> tuple[Any, int]:
    """(model with `method` attached, parameters of the plain model): new, or with the values of a checkpoint.

    What the method keeps beside values is not restored here; see `Method.load_state`.
    """
    model, source = structure(spec, tokenizer, values=resumed is None)
    parameters = sum(p.numel() for p in model.parameters())
    done = sharding(model)
    if resumed is None:
        filler = Filler(model, source)
        method.attach(model, filler.fill, done)
    else:
        tensors = Tensors(resumed)
        method.attach(model)
        filler = Filler(model, tensors)
    for module in in_order(model):
        filler.fill(module)
        done(module)
    if resumed is not None:
        tensors.restore_buffers(model)
    return model, parameters
