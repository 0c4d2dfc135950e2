"""How a model is told to keep packed examples apart, and whether it does: tried on the model itself before the first
step.

transformers draws the border between two examples of a row where position_ids begin anew, for models that hand them to
its functions for masks. Others are given the whole mask. Where that does not help either (no attention, no positions),
packing is refused.

Two made-up examples share a row, and the second one's logits must neither depend on the first one's tokens nor differ
from those that it has alone. What counts as a difference is measured by what there is when the two are one text.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.causal import apart, rounding
from trainer.errors import SpecError

_TOKENS = 12  # of each example, or half a row
_NOTHING = 0.01  # of the difference in one text


def needs_mask(model: Any, limit: int, device: torch.device) -> bool:
    """Whether position_ids alone do not keep examples apart in rows of `limit` tokens, and a mask does.

    Collective where the model is sharded; every rank tries the same. Raises SpecError where neither does.
    """
    trial = _Trial(model, min(_TOKENS, limit // 2), device)
    if trial.problem(masked=False) is None:
        return False
    problem = trial.problem(masked=True)
    if problem is None:
        return True
    raise SpecError(
        f"dataset.packing: {type(model).__name__} cannot have its examples packed: {problem}; use packing false"
    )


def border_mask(position_ids: Tensor) -> Tensor:
    """(rows, 1, tokens, tokens), true where a token may attend: to what is before it in its own example.

    position_ids (rows, tokens) begin anew with every example.
    """
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    example = (steps != 1).cumsum(-1)
    same = example[:, :, None] == example[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]


class _Trial:
    def __init__(self, model: Any, half: int, device: torch.device) -> None:
        self._model, self._half, self._device = model, half, device
        vocabulary = model.config.get_text_config().vocab_size
        self._first, self._other, self._second = torch.randint(
            vocabulary, (3, half), generator=torch.Generator().manual_seed(0)
        )

    def problem(self, masked: bool) -> str | None:
        half = self._half
        anew, one = torch.arange(half).repeat(2), torch.arange(2 * half)
        try:
            alone = self._logits(self._second, positions=torch.arange(half), masked=masked)
            packed, changed = (
                self._logits(first, self._second, positions=anew, masked=masked) for first in (self._first, self._other)
            )
            text, another = (
                self._logits(first, self._second, positions=one, masked=masked) for first in (self._first, self._other)
            )
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            return f"it takes no {'masks of every pair' if masked else 'position_ids'} ({error})"
        noise = rounding(self._model, alone)
        leaks, off = apart(packed, changed), apart(packed, alone)
        # The same shapes and so the same arithmetic: what is masked adds exact zeros.
        if leaks > _NOTHING * apart(text, another) + 1e-3 * noise:
            return f"in a packed row an example sees the one before it (its logits differ by {leaks:.2g})"
        if off > 0.1 * apart(text, alone) + noise:
            return f"an example has other logits in a packed row than alone (they differ by {off:.2g})"
        return None

    def _logits(self, *parts: Tensor, positions: Tensor, masked: bool) -> Tensor:
        """Of the second example. In a batch of two rows, since masks of one row can be simpler."""
        row = torch.cat(parts)
        inputs: dict[str, Any] = {
            "input_ids": torch.stack([row, row.flip(0)]).to(self._device),
            "position_ids": positions.repeat(2, 1).to(self._device),
        }
        if masked:
            inputs["attention_mask"] = border_mask(inputs["position_ids"])
        found: Tensor = self._model(**inputs, use_cache=False).logits
        return found[0, -self._half :].double()
