"""How an attempt ended: what the trainer reported decides, and its exit code where it reported nothing."""

import signal

from jobs.lease import Outcome
from trainer.errors import leaf_of_exit_code
from trainer.events import Event, Finished, Stopped, ending
from trainer.rundir import RunDir

_LOG_TAIL_BYTES = 4000


def outcome_of(rundir: RunDir, exit_code: int, found: list[Event], killed: bool) -> Outcome:
    """`found` is what this attempt reported. `killed`: by us, because it did not stop in time when asked to."""
    end = ending(found)
    if isinstance(end, Finished):
        return Outcome("succeeded", exit_code)
    if isinstance(end, Stopped):
        return Outcome("stopped", exit_code)
    tail = rundir.log_tail(_LOG_TAIL_BYTES)
    if end:
        error = {"code": end.reason, "message": end.message, "rank": end.rank, "log_tail": tail}
        return Outcome("failed", exit_code, error, end.retryable)
    if killed:
        message = "asked to stop, it reached no step boundary in time; what follows its last checkpoint is lost"
        return Outcome("stopped", exit_code, {"code": "killed", "message": message, "log_tail": tail})
    if exit_code < 0 or exit_code > 128:
        name = signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name
        hint = "; on Linux this is often the kernel ending the largest process for lack of memory"
        message = f"the trainer was ended by {name}{hint if name == 'SIGKILL' else ''}"
        return Outcome("failed", exit_code, {"code": "killed", "message": message, "log_tail": tail}, True)
    leaf = leaf_of_exit_code(exit_code)
    message = f"the trainer ended with exit code {exit_code} and reported nothing; see the log"
    return Outcome("failed", exit_code, {"code": leaf.name, "message": message, "log_tail": tail}, leaf.retryable)
