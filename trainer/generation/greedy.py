"""What a model says while it is trained: a few held-out prompts, greedily, at every ZeRO stage and on all ranks alike.

Every rank goes through the same forward passes with the same tokens, since at stage 3 each gathers what the others
hold: which token follows is rank 0's choice, sent to the others, so that a tie or a rounding never parts them. Nothing
is drawn, no gradient is computed, and the mode of the model is as it was: training goes on bit by bit as without.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.config import TrainingSpec
from trainer.datasetconfig import ExamplesDataset
from trainer.finetune.chat import ends_of_answers
from trainer.finetune.task import ExampleTask

# Characters of a prompt that are told, its last ones.
_TOLD = 2000


@dataclass(frozen=True)
class Said:
    prompt: str
    text: str
    wanted: str


def samples(spec: TrainingSpec, task: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Said]:
    """Of the first `dataset.samples` held-out examples: the answer to what comes before the first learnt token.

    Nothing for a task without examples. Collective; `model` is the module inside the engine, in eval mode.
    """
    if not isinstance(task, ExampleTask) or not isinstance(spec.dataset, ExamplesDataset):
        return
    ends = ends_of_answers(model.generation_config, tokenizer, spec.dataset.chat_template)
    for prompt, wanted in task.held_out_answers(spec.dataset.samples):
        if len(prompt) < 2:
            # Of a text all is learnt: the second half is asked for.
            ids = prompt + wanted
            prompt, wanted = ids[: (len(ids) + 1) // 2], ids[(len(ids) + 1) // 2 :]
        said = greedy(model, prompt, spec.dataset.sample_tokens, ends)
        words = [str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in (prompt, said, wanted)]
        yield Said(words[0][-_TOLD:], words[1], words[2])


def greedy(model: Any, prompt: list[int], tokens: int, ends: list[int]) -> list[int]:
    """At most so many tokens behind the prompt, the one that ends a text left out. Collective."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None:
        tokens = min(tokens, context - 1)
        # Models that count positions know no more of them.
        prompt = prompt[-(context - tokens) :]
    configuration = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers' own
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    device = next(model.parameters()).device
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            generation_config=configuration,
            logits_processor=LogitsProcessorList([_OfFirstRank()]),
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found[:-1] if found and found[-1] in ends else found


class _OfFirstRank(LogitsProcessor):
    """Leaves one token possible: the one that is likeliest on rank 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (1, vocabulary)."""
        token = scores.argmax(-1, keepdim=True)
        dist.broadcast(token, src=0)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
