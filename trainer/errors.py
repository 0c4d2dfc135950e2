"""What can end a run, as an exception tree: one class, one name and one exit code per leaf.

    TrainerError
    ├── SpecError         the specification is wrong, or cannot be met on this machine
    ├── DataError         the dataset is missing, unreadable or too short
    ├── CheckpointError   a checkpoint is missing, incomplete or damaged
    ├── DivergenceError   the loss or the gradient is no longer a number, or far above what is usual
    ├── OutOfMemoryError  the device has no memory left
    │   └── HostOutOfMemoryError  the host has none
    ├── InfrastructureError   the disk is full or cannot be written, the hub cannot be reached: a later try may do
    ├── HostGoneError     one of several hosts goes away: the others start again without it, or with another
    └── RolledBackError   the loss has gone wrong: started again, the run goes on from an earlier checkpoint

Everything else is `unknown`. The name travels in the `failed` event and decides whether a retry makes sense.
"""

import errno


class TrainerError(Exception):
    """Root of the tree. `name` goes into events, `exit_code` to the shell, `retryable` to whoever schedules."""

    name = "unknown"
    exit_code = 1
    retryable = True


class SpecError(TrainerError):
    name = "bad_configuration"
    exit_code = 64
    retryable = False


class DataError(TrainerError):
    name = "bad_data"
    exit_code = 65
    retryable = False


class CheckpointError(TrainerError):
    name = "bad_checkpoint"
    exit_code = 66
    retryable = False


class DivergenceError(TrainerError):
    name = "divergence"
    exit_code = 67
    retryable = False


class OutOfMemoryError(TrainerError):
    name = "out_of_memory_device"
    exit_code = 68
    retryable = False


class HostOutOfMemoryError(OutOfMemoryError):
    name = "out_of_memory_host"
    exit_code = 71


class InfrastructureError(TrainerError):
    name = "infrastructure"
    exit_code = 72


class HostGoneError(TrainerError):
    name = "host_gone"
    exit_code = 69


class RolledBackError(TrainerError):
    """`step`: of the checkpoint that was gone back to."""

    name = "rolled_back"
    exit_code = 70

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


LEAVES = (
    SpecError,
    DataError,
    CheckpointError,
    DivergenceError,
    OutOfMemoryError,
    HostOutOfMemoryError,
    InfrastructureError,
    HostGoneError,
    RolledBackError,
)


def leaf_of_exit_code(code: int) -> type[TrainerError]:
    """TrainerError itself for a code that no leaf has."""
    return next((leaf for leaf in LEAVES if leaf.exit_code == code), TrainerError)


def exit_code_of(name: str) -> int:
    return next((leaf.exit_code for leaf in LEAVES if leaf.name == name), TrainerError.exit_code)


def unloadable(field: str, source: str, error: BaseException) -> TrainerError:
    """Why a model or tokeniser cannot be loaded: it is wrong, or the hub is out of reach and a later try may do."""
    message = f"{field}: {source!r} cannot be loaded: {error}"
    cause: BaseException | None = error
    while cause is not None:
        # The hub's client says so when it could not ask; by name, so that this file needs no such package.
        if type(cause).__name__ in (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "TimeoutException",
        ):
            return InfrastructureError(message)
        cause = cause.__cause__ or cause.__context__
    return SpecError(message)


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
# torch raises its own OutOfMemoryError on a device and a plain RuntimeError ("can't allocate memory") on the host.
# Libraries on the device say it in words of their own.
_DEVICE_IS_FULL = ("out of memory", "ALLOC_FAILED")
_SMALLER = "Use a smaller micro_batch, a higher ZeRO stage, or offload."


def classify(error: BaseException) -> TrainerError:
    """The leaf that an arbitrary exception belongs to; the original stays its cause."""
    if isinstance(error, TrainerError):
        return error
    text = f"{type(error).__name__}: {error}"
    leaf = TrainerError(text)
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        leaf = InfrastructureError(f"{text}. Free space on it, or let it be written, then try again.")
    elif "OutOfMemory" in type(error).__name__ or any(words in text for words in _DEVICE_IS_FULL):
        leaf = OutOfMemoryError(f"{text}. {_SMALLER}")
    elif isinstance(error, MemoryError) or "allocate memory" in text:
        leaf = HostOutOfMemoryError(f"{text}. {_SMALLER}")
    leaf.__cause__ = error
    return leaf
