"""A Hugging Face directory as a model that generates, and a request as the tokens of a prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer import access
from trainer.errors import SpecError, unloadable
from trainer.generation.protocol import Directory, Hub, Sampling, Task
from trainer.tokenizer import ends_of_text

# Of a chat, where nothing is said; OpenAI's own for completions is 16, which the API says.
DEFAULT_TOKENS = 512


class Unanswerable(SpecError):
    """`param` is what to change, by its name in the request, or None."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        self.param, self.code = param, code
        super().__init__(message)


@dataclass(frozen=True)
class Loaded:
    """`context`: most tokens of a prompt and what follows it, where the model says. `ends`: tokens that end a text."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    ends: frozenset[int]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def load(place: Directory | Hub, device: torch.device) -> Loaded:
    """Raises Unanswerable where there is no model that transformers can load."""
    name = place.name if isinstance(place, Hub) else place.path
    # A directory that is not there would be looked for at the hub.
    where: dict[str, Any] = {"revision": place.revision} if isinstance(place, Hub) else {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where, **access.remote_code())
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto",
            # The other formats are pickles, and a pickle is a program.
            use_safetensors=True,
            **where,
            **access.remote_code(),
        )
    except (OSError, ValueError) as error:
        raise Unanswerable(str(unloadable("model", name, error)), "model", "model_not_found") from error
    ends = frozenset(ends_of_text(model.generation_config, tokenizer))
    # Its own says how to sample (top_k 50, and what its makers found best), where a request says nothing.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers' own
        eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Loaded(model.to(device).eval(), tokenizer, context, ends)


def prompts_of(task: Task, loaded: Loaded) -> list[list[int]]:
    """Token ids of each prompt. Raises Unanswerable."""
    if task.messages is not None:
        prompts, field = [_of_messages(task.messages, loaded.tokenizer)], "messages"
    else:
        prompts, field = [_of_prompt(prompt, loaded) for prompt in task.prompts], "prompt"
    for prompt in prompts:
        most_tokens(task.sampling, loaded, len(prompt), field)
    return prompts


def most_tokens(sampling: Sampling, loaded: Loaded, prompt: int, field: str = "prompt") -> int:
    """Of a text behind a prompt of so many tokens. Raises Unanswerable where they do not fit the model."""
    room = loaded.context - prompt if loaded.context is not None else None
    wanted = sampling.max_tokens or (DEFAULT_TOKENS if room is None else max(1, min(DEFAULT_TOKENS, room)))
    if room is not None and wanted > room:
        raise Unanswerable(
            f"This model's maximum context length is {loaded.context} tokens. However, {prompt} of the {field} and "
            f"{wanted} of the completion were asked for; reduce one of them.",
            field,
            "context_length_exceeded",
        )
    return wanted


def _of_messages(messages: tuple[dict[str, Any], ...], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        raise Unanswerable(
            "messages: this model has no chat template; ask /v1/completions with a prompt",
            "messages",
            "no_chat_template",
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise Unanswerable(f"messages: the model's chat template refuses them: {error}", "messages") from error
    # The template has written whatever special tokens there are to be.
    ids: list[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    if not ids:
        raise Unanswerable("messages: the model's chat template makes nothing of them", "messages")
    return ids


def _of_prompt(prompt: str | tuple[int, ...], loaded: Loaded) -> list[int]:
    ids = list(prompt) if not isinstance(prompt, str) else list(loaded.tokenizer(prompt)["input_ids"])
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if not ids:
        # A model that was trained with one may begin with it.
        start = loaded.tokenizer.bos_token_id
        if start is None:
            raise Unanswerable("prompt: it is empty, and this model has no token to begin with", "prompt")
        ids = [start]
    wrong = [token for token in ids if not 0 <= token < rows]
    if wrong:
        raise Unanswerable(f"prompt: token {wrong[0]} is outside of the model's {rows}", "prompt")
    return ids
