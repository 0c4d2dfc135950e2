"""The classes of failure that an attempt can end with: what each means, and whether it is tried again by default.

A trainer names most of them itself (`trainer.errors`); the others are the supervisor's judgement of one that said
nothing.
"""

from typing import Literal, get_args

from trainer.errors import HostGoneError, RolledBackError

FailureClass = Literal[
    "out_of_memory_device",
    "out_of_memory_host",
    "divergence",
    "bad_data",
    "bad_configuration",
    "bad_checkpoint",
    "infrastructure",
    "killed",
    "unknown",
]

MEANINGS: dict[FailureClass, str] = {
    "out_of_memory_device": "an accelerator had no memory left: it would not have the next time",
    "out_of_memory_host": "the host had no memory left, or the kernel ended the trainer for that",
    "divergence": "the loss or a gradient was no longer a number, or the loss left its usual range",
    "bad_data": "the dataset is missing, unreadable or too short",
    "bad_configuration": "the specification is wrong, or cannot be met by this worker",
    "bad_checkpoint": "no checkpoint could be read",
    "infrastructure": "the worker, its machine, its disk or its network failed",
    "killed": "a signal ended the trainer",
    "unknown": "anything else",
}
assert set(MEANINGS) == set(get_args(FailureClass))

RETRIED_BY_DEFAULT: tuple[FailureClass, ...] = ("infrastructure", "killed", "unknown")

# Names of the trainer that are, to a user, another class. A rollback that no start follows was ended in between.
_RENAMED = {HostGoneError.name: "infrastructure", RolledBackError.name: "killed"}


def class_of(name: str) -> str:
    """The class of a failure that the trainer calls `name`; "unknown" for one that this version does not know."""
    known = _RENAMED.get(name, name)
    return known if known in MEANINGS else "unknown"


def backoff(base: float, failures: int) -> float:
    """Seconds before the next attempt after `failures` ones: doubling, an hour at most."""
    return min(base * 2.0 ** min(failures - 1, 40), 3600.0)
