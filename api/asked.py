"""What POST /v1/chat/completions and /v1/completions take: OpenAI's names, and no setting that is passed over.

What is not known here is refused by name, unless it says what happens anyway (`n: 1`, `logprobs: false`, null).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from trainer.generation.protocol import MOST_CHOICES, MOST_STOPS, Sampling
from trainer.strict import refuse

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own
_LONGEST = 2**31 - 1

# What OpenAI has and this has not, each with the values that ask for nothing.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Who asks on whose behalf: nothing follows from it here.
_NAMES_OF_USERS = ("user", "safety_identifier")

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Asked):
    include_usage: bool = Field(default=False, description="a last chunk with the counts of tokens")
    include_obfuscation: Literal[False] | None = None


class Asked(_Asked):
    """What the two have in common."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)] = Field(
        description="a fine-tuned model (ft:…), a checkpoint of one (ft:…:ckpt-step-N), or one to fine-tune"
    )
    temperature: float | None = Field(default=None, ge=0, le=2, description="default: 1; 0: the likeliest token")
    top_p: float | None = Field(default=None, gt=0, le=1, description="default: 1")
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES, description="choices, one after the other; default: 1")
    stop: Stop | list[Stop] | None = Field(default=None, max_length=256, description=f"up to {MOST_STOPS} strings")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="the same text again")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="default: 0")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="default: 0")
    max_tokens: int | None = Field(default=None, ge=1, le=_LONGEST, description="most of a choice")
    stream: bool | None = Field(default=None, description="chunks as server-sent events, as they are made")
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_passed_over(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None and name not in _NAMES_OF_USERS}
        for name in _ABSENT.keys() & given.keys():
            if given.pop(name) not in _ABSENT[name]:
                raise refuse(name, "is not supported here; leave it out, or serve an export with an inference server")
        return given

    @model_validator(mode="after")
    def _few_stops(self) -> "Asked":
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise refuse("stop", f"{len(self.stop)} strings; at most {MOST_STOPS} are allowed")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "is allowed only when stream is true")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    def sampling(self, most: int | None) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            max_tokens=most,
            stop=tuple(stops),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class AskedMessage(_Asked):
    """Text alone: no image, no sound, no call of a tool."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A client that sends back what it was answered sends much that is null, or empty."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        return {name: value for name, value in given.items() if not (name == "annotations" and value == [])}

    def plain(self) -> dict[str, Any]:
        """As chat templates have it, which know no developers."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Asked):
    messages: list[AskedMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_LONGEST, description="the newer name")

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refuse("max_tokens", "is the older name of max_completion_tokens; give one of the two")
        return self


Token = Annotated[int, Field(ge=0, le=_LONGEST)]


class CompletionRequest(Asked):
    prompt: str | Annotated[list[Token], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] = Field(
        description="text, or token ids, or several texts"
    )

    @model_validator(mode="after")
    def _few_choices(self) -> "CompletionRequest":
        if len(self.prompts) * self.choices > MOST_CHOICES:
            raise refuse(
                "prompt",
                f"{len(self.prompts)} prompts × n {self.choices} choices are more than {MOST_CHOICES}; ask again",
            )
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        texts = tuple(text for text in self.prompt if isinstance(text, str))
        return texts or (tuple(token for token in self.prompt if isinstance(token, int)),)
