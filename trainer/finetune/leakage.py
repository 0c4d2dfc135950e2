"""Whether a model keeps packed examples apart, tried on the model itself before the first step.

transformers draws the border between two examples of a row where position_ids begin anew, for models that build their
masks by its own functions. Others take position_ids and let examples see each other, or ignore them. So two made-up
examples share a row, and the second one's logits must neither depend on the first one's tokens nor differ from those
that it has alone. What counts as a difference is measured by what there is when the two are one text.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.errors import SpecError

_TOKENS = 12  # of each example, or half a row
_NOTHING = 0.01  # of the difference in one text


def check_packing(model: Any, limit: int, device: torch.device) -> None:
    """Collective where the model is sharded; every rank tries the same. Raises SpecError."""
    half = min(_TOKENS, limit // 2)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, half), generator=generator)
    apart = torch.arange(half).repeat(2)

    def logits(*parts: Tensor, positions: Tensor) -> Tensor:
        """Of the second example. In a batch of two rows, since masks of one row can be simpler."""
        row = torch.cat(parts)
        rows = torch.stack([row, row.flip(0)]).to(device)
        named = {"input_ids": rows, "position_ids": positions.expand(2, -1).to(device), "use_cache": False}
        found: Tensor = model(**named).logits
        return found[0, -half:].double()

    try:
        packed = logits(first, second, positions=apart)
        changed = logits(other, second, positions=apart)
        alone = logits(second, positions=torch.arange(half))
        one_text = logits(first, second, positions=torch.arange(2 * half))
        another = logits(other, second, positions=torch.arange(2 * half))
    except TypeError as error:
        raise _refusal(model, f"it takes no position_ids ({error})") from error
    rounding = 16 * torch.finfo(next(model.parameters()).dtype).eps * float(alone.abs().max())
    leaks, would = _apart(packed, changed), _apart(one_text, another)
    # The same shapes and so the same arithmetic: what is masked adds exact zeros.
    if leaks > _NOTHING * would + 1e-3 * rounding:
        raise _refusal(model, f"in a packed row an example sees the one before it (its logits differ by {leaks:.2g})")
    off = _apart(packed, alone)
    if off > 0.1 * _apart(one_text, alone) + rounding:
        raise _refusal(model, f"an example has other logits in a packed row than alone (they differ by {off:.2g})")


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _refusal(model: Any, why: str) -> SpecError:
    return SpecError(
        f"dataset.packing: {type(model).__name__} cannot have its examples packed: {why}; use packing false"
    )
