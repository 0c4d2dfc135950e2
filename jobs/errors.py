"""What the domain refuses.

JobsError
├── JobNotFound    no job has this id
├── UnknownCursor  no job has the id that a page was to begin behind
├── WrongState     the job's state does not allow the operation
└── LeaseLost      somebody else may be running this job now: write nothing more
"""


class JobsError(Exception):
    """Root of the tree."""


class JobNotFound(JobsError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}; GET /v1/jobs lists them")


class UnknownCursor(JobsError):
    def __init__(self, after: str) -> None:
        super().__init__(f"after: there is no job {after!r}; give the last_id of the page before")


class WrongState(JobsError):
    def __init__(self, job_id: str, state: str, operation: str, needed: str) -> None:
        super().__init__(f"job {job_id} is {state}: only a {needed} job can be {operation}")


class LeaseLost(JobsError):
    def __init__(self, job_id: str, fence: int) -> None:
        super().__init__(f"the lease {fence} on job {job_id} is void")
