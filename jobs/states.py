"""The states of a job and the edges between them.

    queued ─claim→ running ─→ succeeded
      │               ├─────→ failed       not retryable, or attempts used up
      │               ├─────→ queued       retryable failure, lost lease, worker shut down
      ├──→ cancelled ←┤
      └──→ paused    ←┘ ─→ queued

A wish to cancel or to pause is not a state: it is a column that the supervisor of a running job sees.
"""

from enum import StrEnum


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = (State.SUCCEEDED, State.FAILED, State.CANCELLED)
