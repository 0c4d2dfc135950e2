"""One choice, token by token, by transformers' own `generate`: its cache, its samplers, its end."""

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from trainer.generation.loaded import Loaded, most_tokens
from trainer.generation.protocol import Sampling
from trainer.generation.spoken import Spoken

# Of a prompt's tokens, how many are decoded again for how the first of the text reads.
_BEFORE = 8
Finish = Literal["stop", "length"]


def generate(
    loaded: Loaded,
    prompt: list[int],
    sampling: Sampling,
    give: Callable[[str], None],
    gone: threading.Event,
    continues: bool = True,
    until: float = math.inf,
) -> tuple[Finish, int]:
    """Call `give` with each piece of text as it comes; (why it ended, tokens that were generated).

    Ends at the next token once `gone` is set, or the monotonic clock is at `until`, which is an end by length.
    `continues`: the text is the prompt's own continuation, so that a space between the two belongs to it; an answer to
    messages begins anew.
    """
    spoken = Spoken(_decoder(loaded), sampling.stop, prompt[-_BEFORE:] if continues else [])
    if time.monotonic() >= until:
        return "length", 0
    speaking = _Speaking(loaded, len(prompt), spoken, give, lambda: gone.is_set() or time.monotonic() >= until)
    generator = loaded.device if loaded.device.type == "cuda" else None
    with torch.random.fork_rng(devices=[generator] if generator else []), torch.inference_mode():
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed % 2**63)
        else:
            torch.seed()
        loaded.model.generate(
            torch.tensor([prompt], device=loaded.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=loaded.device),
            generation_config=_configuration(loaded, sampling, most_tokens(sampling, loaded, len(prompt))),
            logits_processor=LogitsProcessorList(_penalties(sampling, len(prompt))),
            stopping_criteria=StoppingCriteriaList([speaking]),
        )
    rest = spoken.end()
    if rest:
        give(rest)
    return "stop" if speaking.ended or spoken.stopped else "length", speaking.tokens


class _Speaking(StoppingCriteria):
    """Hears of each token, says what can be shown of it, and whether it was the last."""

    def __init__(
        self, loaded: Loaded, prompt: int, spoken: Spoken, give: Callable[[str], None], stopped: Callable[[], bool]
    ) -> None:
        self._ends, self._prompt, self._spoken, self._give, self._stopped = loaded.ends, prompt, spoken, give, stopped
        self.tokens = 0
        self.ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        token = int(input_ids[0, -1])
        self.tokens = input_ids.shape[1] - self._prompt
        self.ended = token in self._ends
        if not self.ended:
            piece = self._spoken.add(token)
            if piece:
                self._give(piece)
        done = self.ended or self._spoken.stopped or self._stopped()
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)


class Penalties(LogitsProcessor):
    """OpenAI's: logit − count · frequency − (count > 0) · presence, over the tokens behind the prompt."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (1, tokens so far), scores (1, vocabulary)."""
        counts = torch.zeros_like(scores)
        said = input_ids[:, self._prompt :]
        counts.scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - counts * self._frequency - (counts > 0) * self._presence


def _penalties(sampling: Sampling, prompt: int) -> list[LogitsProcessor]:
    if not sampling.presence_penalty and not sampling.frequency_penalty:
        return []
    return [Penalties(prompt, sampling.presence_penalty, sampling.frequency_penalty)]


def _configuration(loaded: Loaded, sampling: Sampling, most: int) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # All of the vocabulary: transformers would take the 50 likeliest.
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends = loaded.model.generation_config
    return GenerationConfig(  # type: ignore[no-untyped-call]  # transformers' own
        max_new_tokens=most, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id, use_cache=True, **chosen
    )


def _decoder(loaded: Loaded) -> Callable[[list[int]], str]:
    def decode(tokens: list[int]) -> str:
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode
