"""Whether a model is a causal language model: tried on the model itself, before the first step."""

from typing import Any

import torch
from torch import Tensor

from trainer.errors import SpecError

_TOKENS = 12


def check_causal(model: Any, limit: int, device: torch.device) -> None:
    """Raises SpecError for a model whose tokens see those that follow, which they are to predict: an encoder, whatever
    head it is given. Collective where the model is sharded; every rank tries the same.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, min(_TOKENS, limit)), generator=generator).to(device)
    another = ids.clone()
    another[:, -1] = (another[:, -1] + 1) % vocabulary
    before, after = (model(input_ids=given, use_cache=False).logits[:, :-1].double() for given in (ids, another))
    if apart(before, after) > rounding(model, before):
        raise SpecError(
            f"model: in {type(model).__name__} a token sees those that follow it, so there is nothing to predict; "
            "choose a causal language model (an encoder that shall be one has is_decoder in its config.json), or task "
            "classify"
        )


def rounding(model: Any, logits: Tensor) -> float:
    """How far logits may be from others that are the same, in the model's type."""
    return 16 * torch.finfo(next(model.parameters()).dtype).eps * float(logits.abs().max())


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
