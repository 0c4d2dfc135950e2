"""Going back to a checkpoint: which one, and the record beside it that makes it count.

    rollbacks.json  beside the checkpoint that is gone back to: how many rollbacks the run has had, and the scale of the
                    learning rate from here on

Reading the checkpoint applies its record (trainer.checkpoint.reading): whoever starts the run again, on whichever host,
starts behind the rollback.
"""

import json
from typing import Any

from trainer.checkpoint.place import Place

_RECORD = "rollbacks.json"


def record_of(place: Place, step: int) -> dict[str, Any] | None:
    """`rollbacks` and `rate_scale`, in place of those in the guard's state; None where nobody went back to `step`.

    Raises OSError and ValueError.
    """
    try:
        record: dict[str, Any] = json.loads(place.read(step, _RECORD))
    except FileNotFoundError:
        return None
    return record


def go_back(place: Place, suspect: int, rollbacks: int, rate_scale: float) -> int | None:
    """Make the run go on from the newest checkpoint before the step `suspect`, with these values of its guard.

    One that was gone back to before is passed over while there are older ones: the loss went wrong behind it twice. All
    that are newer than the chosen one are removed. None, and nothing has happened, where none is before `suspect`.
    """
    steps = [step for step in place.complete_steps() if step < suspect]
    if not steps:
        return None
    unused = [step for step in steps if record_of(place, step) is None]
    chosen = unused[-1] if unused else steps[0]
    # First, for one that is newer would be resumed from. Killed before the record is there, a run repeats what it did
    # since, and gets here once more.
    for step in place.complete_steps():
        if step > chosen:
            place.remove(step)
    place.write(chosen, _RECORD, json.dumps({"rollbacks": rollbacks, "rate_scale": rate_scale}).encode())
    return chosen
