"""What a run reports: one JSON line each in events.jsonl. Imports no torch.

Seconds are wall-clock, bytes are bytes, `at` is Unix time, `step` counts finished optimizer steps (the first is 1).
"""

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer import durable
from trainer.errors import RolledBackError

log = logging.getLogger("stiefel.trainer")


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)

    at: float = Field(default_factory=time.time)
    step: int


class Preparing(_Event):
    """Before the first step: what the trainer is busy with. `done` of `total`, where a total is known."""

    type: Literal["preparing"] = "preparing"
    what: str
    done: int | None = None
    total: int | None = None


class Prepared(_Event):
    """The examples of a fine-tuning are read and tokenised."""

    type: Literal["prepared"] = "prepared"
    examples: int = Field(description="that are trained on")
    held_out: int
    left_out: int = Field(description="too long (truncation: drop), or without a token to learn")
    truncated: int
    tokens: int = Field(description="of all that are trained on")
    trained_tokens: int = Field(description="of these, those whose prediction is learnt")
    longest: int = Field(description="tokens, before truncation")
    median: int


class Started(_Event):
    """Training begins after `step`, which is 0 or the step of the checkpoint that was resumed."""

    type: Literal["started"] = "started"
    steps: int
    processes: int
    device: str
    parameters: int = Field(description="of the model as exported")
    trained_parameters: int
    optimizer_state_bytes: int = Field(description="one copy of the moments, counted on live tensors")
    full_adamw_state_bytes: int = Field(description="what AdamW's two moments of every parameter would take")
    tokens_per_step: int
    training_tokens: int = Field(description="tokens in the training part of the dataset")


class Step(_Event):
    type: Literal["step"] = "step"
    loss: float = Field(description="mean over the global batch, before the update")
    learning_rate: float
    gradient_norm: float = Field(description="of the trained parameters, before clipping")
    tokens: int = Field(description="trained on so far")
    seconds: float = Field(description="of this step, switch included")
    projection_seconds: float = Field(description="of this step's switch; 0 where there was none")
    tokens_per_second: float
    mfu: float | None = Field(default=None, description="model FLOPs utilisation, 0 to 1; null on unknown hardware")
    peak_device_bytes: int | None = Field(description="largest of the ranks; null without an accelerator")
    peak_host_bytes: int = Field(description="resident, largest of the ranks")
    accuracy: float | None = Field(default=None, description="share of the trained tokens, or labels, that was right")


class Switched(_Event):
    """New subspaces before the update of `step`; for LORO an exact step, for ReLoRA a restart."""

    type: Literal["switched"] = "switched"
    seconds: float
    energy_kept: float | None = Field(description="mean share of the gradient's squared norm inside the new basis")
    fallbacks: int = Field(
        description="matrices that kept what they had (gradient not finite, no SVD), or were solved with damping"
    )


class Evaluated(_Event):
    type: Literal["evaluated"] = "evaluated"
    loss: float
    perplexity: float
    sequences: int
    seconds: float
    accuracy: float | None = Field(default=None, description="share of the held-out tokens, or labels, that was right")
    metrics: dict[str, float] = Field(default={}, description="a classification's, by name: matthews, f1, pearson …")


class Sampled(_Event):
    """What the model of `step` makes of a held-out prompt, greedily."""

    type: Literal["sampled"] = "sampled"
    prompt: str
    text: str
    wanted: str | None = Field(default=None, description="what the example has")


class Checkpointed(_Event):
    """A checkpoint of `step` counts from now on; later steps may have been made meanwhile."""

    type: Literal["checkpointed"] = "checkpointed"
    path: str
    bytes: int
    seconds: float = Field(description="from the beginning until it counted")
    stalled_seconds: float = Field(default=0.0, description="how long training stood still for it")
    loss: float | None = Field(default=None, description="on the held-out sequences, where it is known")


class Spiked(_Event):
    """The loss has been far above what is usual for as many steps as guard.patience says."""

    type: Literal["spiked"] = "spiked"
    loss: float
    usual: float = Field(description="mean of the last ordinary losses")
    deviations: float = Field(description="standard deviations of those that the loss is above their mean")


class RolledBack(_Event):
    """The loss went wrong at `from_step`: the trainer starts again, from the checkpoint of `step`."""

    type: Literal["rolled_back"] = "rolled_back"
    from_step: int
    rate_scale: float = Field(description="of the learning rate from now on: the product of all rollbacks' factors")
    reason: str


class Stopped(_Event):
    """Ended on request, with a checkpoint of `step`."""

    type: Literal["stopped"] = "stopped"


class Finished(_Event):
    type: Literal["finished"] = "finished"
    seconds: float = Field(description="of this attempt")


class Failed(_Event):
    type: Literal["failed"] = "failed"
    reason: str = Field(description="name of a leaf in trainer.errors")
    message: str
    retryable: bool
    rank: int


Event = Annotated[
    Preparing
    | Prepared
    | Started
    | Step
    | Switched
    | Evaluated
    | Sampled
    | Checkpointed
    | Spiked
    | RolledBack
    | Stopped
    | Finished
    | Failed,
    Field(discriminator="type"),
]
_ANY: TypeAdapter[Event] = TypeAdapter(Event)


def parse(line: str | bytes) -> Event:
    """One line of events.jsonl. Raises pydantic.ValidationError on anything else."""
    return _ANY.validate_json(line)


class EventLog:
    """Appends events, each line in one write to a file opened for appending: ranks do not tear each other's lines."""

    def __init__(self, path: Path) -> None:
        self.last_step = 0
        torn, new = _last_byte(path) not in (b"\n", b""), not path.exists()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if torn:  # what an earlier attempt left: the first line of this one shall not be glued to it
            os.write(self._descriptor, b"\n")
        if new:
            durable.sync(path.parent)

    def write(self, event: Event) -> None:
        # A checkpoint may count only after later steps.
        self.last_step = max(self.last_step, event.step)
        line = event.model_dump_json().encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "an event could not be written whole: the disk is full")

    def sync(self) -> None:
        """What is written outlives a power cut afterwards. To be called before a checkpoint counts that is behind it:
        what is trained again after a power cut is reported again, what is not would be missing from the curve."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read_from(path: Path, offset: int) -> tuple[list[tuple[int, Event]], int]:
    """Whole lines after byte `offset`, each with the offset behind it, and the offset behind the last whole line.

    A line still being written is left for the next call; a missing file reads as empty.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            block = file.read()
    except FileNotFoundError:
        return [], offset
    found = []
    for line in _whole_lines(block):
        offset += len(line)
        try:
            found.append((offset, parse(line)))
        except ValidationError:
            # Torn by a full disk or a power cut. One line is lost; stopping here would lose all that follow.
            log.warning("%s: the line before byte %d cannot be read and is left out", path, offset)
    return found, offset


def ending(found: Iterable[Event]) -> Finished | Stopped | Failed | None:
    """How training ended, if it did. Of several failures the first is the cause: the other ranks lost their peer.

    What comes before the last start does not count: the ranks have been started again since. A rollback that no start
    follows is a failure; a later try may do.
    """
    end: Finished | Stopped | Failed | None = None
    for event in found:
        if isinstance(event, Started):
            end = None
        # Both are reported when all is on disk: what fails on the way out changes nothing about that.
        elif isinstance(event, Finished | Stopped) or (isinstance(event, Failed) and end is None):
            end = event
        elif isinstance(event, RolledBack) and end is None:
            end = _not_started_again(event)
    return end


def _not_started_again(event: RolledBack) -> Failed:
    message = f"{event.reason}; gone back to step {event.step}, from which nothing has started again"
    leaf = RolledBackError
    return Failed(at=event.at, step=event.step, reason=leaf.name, message=message, retryable=leaf.retryable, rank=0)


def _last_byte(path: Path) -> bytes:
    """Empty for an empty file or none."""
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _whole_lines(block: bytes) -> Iterator[bytes]:
    # Not splitlines, which also takes a lone carriage return for an end.
    return (line + b"\n" for line in block.split(b"\n")[:-1])


def read(path: Path) -> Iterable[Event]:
    """Every event of a finished or running run."""
    return [event for _, event in read_from(path, 0)[0]]
