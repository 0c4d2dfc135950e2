"""How an attempt ended: what the trainer reported decides, and its exit code where it reported nothing."""

import signal
from typing import Any

from jobs.failures import class_of
from jobs.lease import Outcome
from trainer.errors import leaf_of_exit_code
from trainer.events import Event, Finished, Stopped, ending
from trainer.rundir import RunDir

_LOG_TAIL_BYTES = 4000


def outcome_of(rundir: RunDir, exit_code: int, found: list[Event], killed: bool, kernel_kills: int = 0) -> Outcome:
    """`found` is what this attempt reported. `killed`: by us, because it did not stop in time when asked to.

    `kernel_kills`: processes around this worker that the kernel has killed for lack of memory meanwhile.
    """
    end = ending(found)
    if isinstance(end, Finished):
        return Outcome("succeeded", exit_code)
    if isinstance(end, Stopped):
        return Outcome("stopped", exit_code)
    number = _signal_of(exit_code)
    error: dict[str, Any] = {"log_tail": rundir.log_tail(_LOG_TAIL_BYTES), "exit_code": exit_code}
    if number is not None:
        error["signal"] = number.name
    if end:
        return Outcome(
            "failed", exit_code, error | {"code": class_of(end.reason), "message": end.message, "rank": end.rank}
        )
    if killed:
        message = "asked to stop, it reached no step boundary in time; what follows its last checkpoint is lost"
        return Outcome("stopped", exit_code, error | {"code": "killed", "message": message})
    if number is signal.SIGKILL and kernel_kills:
        message = "the kernel ended the trainer because the host, or this worker's share of it, had no memory left"
        remedy = "use a smaller micro_batch, a higher ZeRO stage, or more memory"
        return Outcome("failed", exit_code, error | {"code": "out_of_memory_host", "message": f"{message}; {remedy}"})
    if number is not None:
        hint = "; on Linux this is often the kernel ending the largest process for lack of memory"
        message = f"the trainer was ended by {number.name}{hint if number is signal.SIGKILL else ''}"
        return Outcome("failed", exit_code, error | {"code": "killed", "message": message})
    words = error["log_tail"].strip().rpartition("\n")[2][-500:]
    message = f"the trainer ended with exit code {exit_code} and reported nothing; its last words: {words or 'none'}"
    return Outcome(
        "failed", exit_code, error | {"code": class_of(leaf_of_exit_code(exit_code).name), "message": message}
    )


def _signal_of(exit_code: int) -> signal.Signals | None:
    """Of a process that a signal has ended, also one that a shell or a launcher reports as 128 + its number."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None
