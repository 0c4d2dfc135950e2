"""What the domain refuses.

JobsError
├── JobNotFound        no job of the caller's has this id
├── TuningJobNotFound  no fine-tuning job of the caller's has this id
├── ModelNotFound      no model that the caller may use has this name
├── WorkerNotFound     no worker has this name
├── KeyNotFound        no API key has this id
├── FileUnknown        no file of the caller's has this id
├── Refused            a field of a request names what is not there, or contradicts another
├── NotChecked         an uploaded file is still being looked at: later it may do
├── WebhookNotFound    no webhook of the caller's has this id
├── NotDelivered       nobody has answered a webhook's test
├── UnknownCursor      nothing has the id that a page was to begin behind
├── WrongState         the job's state does not allow the operation
├── ModelInUse         a job that has not ended starts from a model that is to be deleted
├── FilesInUse         a job's files cannot be removed just now
├── FileNeeded         a file cannot be removed: a job that has not ended needs it
├── FileDamaged        a file's bytes are no longer those that were uploaded
├── StoreAway          the place of uploaded files cannot be read or written just now
├── TokenizerUnloadable  the tokeniser that is to count files' tokens cannot
├── IdempotencyReused  the same Idempotency-Key came with another request
├── QuotaExceeded      the API key has used up what it may use
├── Forbidden          a file or place lies outside what the installation allows
└── LeaseLost          somebody else may be running this job now: write nothing more
"""

from collections.abc import Sequence


class JobsError(Exception):
    """Root of the tree."""


class JobNotFound(JobsError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}; GET /v1/jobs lists them")


class TuningJobNotFound(JobsError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no fine-tuning job {job_id!r}; GET /v1/fine_tuning/jobs lists them")


class ModelNotFound(JobsError):
    """`reason`: more than that it is not there, where there is more to say."""

    def __init__(self, name: str, reason: str = "GET /v1/models lists those that are there") -> None:
        self.name, self.reason = name, reason
        super().__init__(f"there is no model {name!r}: {reason}")


class Refused(JobsError):
    """`field` is the one to change."""

    def __init__(self, field: str, reason: str, code: str = "invalid_value") -> None:
        self.field, self.reason, self.code = field, reason, code
        super().__init__(f"{field}: {reason}")


class NotChecked(JobsError):
    def __init__(self, field: str, file_id: str) -> None:
        self.field, self.file_id = field, file_id
        super().__init__(f"{field}: {file_id} is still being checked; try again in a moment")


class WorkerNotFound(JobsError):
    def __init__(self, name: str) -> None:
        super().__init__(f"there is no worker {name!r}; GET /v1/workers lists them")


class KeyNotFound(JobsError):
    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no API key {key_id!r}; `stiefel keys list` lists them")


class FileUnknown(JobsError):
    def __init__(self, file_id: str) -> None:
        super().__init__(f"there is no file {file_id!r}; GET /v1/files lists them")


class WebhookNotFound(JobsError):
    def __init__(self, webhook_id: str) -> None:
        super().__init__(f"there is no webhook {webhook_id!r}; GET /v1/webhook_endpoints lists them")


class NotDelivered(JobsError):
    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} has not answered: {reason}")


class UnknownCursor(JobsError):
    def __init__(self, after: str, kind: str = "job") -> None:
        super().__init__(f"after: there is no {kind} {after!r}; give the last_id of the page before")


class WrongState(JobsError):
    def __init__(self, job_id: str, state: str, operation: str, needed: str) -> None:
        self.state, self.operation, self.needed = state, operation, needed
        super().__init__(f"job {job_id} is {state}: only a {needed} job can be {operation}")


class ModelInUse(JobsError):
    def __init__(self, job_id: str, by: Sequence[str]) -> None:
        more = f" and {len(by) - 1} more" if len(by) > 1 else ""
        super().__init__(f"{by[0]}{more} starts from the model of job {job_id}; cancel it first, or wait for its end")


class FilesInUse(JobsError):
    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(f"the files of job {job_id} cannot be removed at the moment: {reason}; try again")


class FileNeeded(JobsError):
    def __init__(self, file_id: str, job_ids: Sequence[str]) -> None:
        jobs = ", ".join(job_ids[:3]) + (f" and {len(job_ids) - 3} more" if len(job_ids) > 3 else "")
        super().__init__(
            f"file {file_id} is needed by {jobs}, which {'have' if len(job_ids) > 1 else 'has'} not ended; cancel, or "
            "wait for the end, and delete it then"
        )


class FileDamaged(JobsError):
    def __init__(self, file_id: str, reason: str) -> None:
        super().__init__(f"file {file_id} is damaged where it is kept: {reason}; upload it again")


class StoreAway(JobsError):
    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"the store of files cannot be {operation} at the moment: {reason}; try again")


class TokenizerUnloadable(JobsError):
    def __init__(self, tokenizer: str, reason: str) -> None:
        super().__init__(
            f"STIEFEL_FILES_TOKENIZER: {tokenizer!r} cannot count the tokens of files: {reason}. Give 'bytes', a "
            "directory with tokenizer.json, or the name of one on the hub that this machine reaches"
        )


class IdempotencyReused(JobsError):
    def __init__(self, key: str, job_id: str) -> None:
        super().__init__(
            f"Idempotency-Key {key!r} belongs to job {job_id}, which was submitted with another body; use a new key"
        )


class QuotaExceeded(JobsError):
    """`quota` is the name of the limit."""

    def __init__(self, quota: str, used: str, limit: str, remedy: str) -> None:
        self.quota = quota
        super().__init__(f"{quota}: this API key uses {used} of {limit}; {remedy}")


class Forbidden(JobsError):
    """`field` is the one to change."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.reason = field, message
        super().__init__(f"{field}: {message}")


class LeaseLost(JobsError):
    def __init__(self, job_id: str, fence: int) -> None:
        super().__init__(f"the lease {fence} on job {job_id} is void")
