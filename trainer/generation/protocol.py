"""What the API and the generator say to each other. Imports no torch.

POST /generate takes a `Task` as JSON, with `Authorization: Bearer SECRET`, and answers in lines of JSON, each one of
these, as they come:

    began       the model is loaded and the prompts are read; how many tokens they have
    piece       more text of a choice
    ended       a choice is whole
    refused     in place of `began`: this cannot be done, and `param` says what to change
    late        in place of `began`: its turn did not come within the task's seconds
    failed      something went wrong on the way; nothing follows

A client that goes away ends its task. 503, with Retry-After, is the answer where too many wait already, 429 where too
many of the task's owner do; 401 that to a wrong secret. GET /healthz says whether the process is alive, and what it
holds.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MOST_CHOICES = 4
MOST_STOPS = 4


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Directory(_Said):
    """A Hugging Face directory."""

    type: Literal["directory"] = "directory"
    path: str


class Hub(_Said):
    """A model of the Hugging Face hub, which the generator fetches."""

    type: Literal["hub"] = "hub"
    name: str
    revision: str = "main"


class Checkpoint(_Said):
    """A checkpoint of a run, which is exported into the run directory first, if it was not yet."""

    type: Literal["checkpoint"] = "checkpoint"
    run: str = Field(description="the run directory")
    step: int


class Sampling(_Said):
    """How each next token is chosen."""

    temperature: float = Field(default=1.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="of the likeliest tokens that together are so likely")
    max_tokens: int | None = Field(default=None, ge=1, description="default: the server's")
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(default=(), max_length=MOST_STOPS)
    seed: int | None = Field(default=None, description="the same text again, of the same process and version")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)


class Task(_Said):
    """Messages, which the model's chat template makes one prompt of; or prompts, as text or as token ids."""

    model: Annotated[Directory | Hub | Checkpoint, Field(discriminator="type")]
    messages: tuple[dict[str, Any], ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    choices: int = Field(default=1, ge=1, le=MOST_CHOICES, description="of each prompt")
    sampling: Sampling = Sampling()
    owner: str = Field(default="", description="whose it is: of one owner few may wait; empty: nobody's")
    seconds: float = Field(default=120, gt=0, description="that it waits at most, and that it speaks at most")


class Began(_Said):
    type: Literal["began"] = "began"
    prompt_tokens: int


class Piece(_Said):
    type: Literal["piece"] = "piece"
    index: int = Field(description="of the choice")
    text: str


class Ended(_Said):
    type: Literal["ended"] = "ended"
    index: int
    finish_reason: Literal["stop", "length"]
    tokens: int = Field(description="that were generated, the one that ends a text included")


class Refused(_Said):
    type: Literal["refused"] = "refused"
    message: str
    param: str | None = None
    code: str = "invalid_value"


class Late(_Said):
    type: Literal["late"] = "late"


class Failed(_Said):
    type: Literal["failed"] = "failed"
    message: str


Line = Annotated[Began | Piece | Ended | Refused | Late | Failed, Field(discriminator="type")]
LINES: TypeAdapter[Line] = TypeAdapter(Line)
