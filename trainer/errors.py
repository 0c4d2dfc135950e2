"""What can end a run, as an exception tree: one class, one name and one exit code per leaf.

    TrainerError
    ├── SpecError         the specification is wrong, or cannot be met on this machine
    ├── DataError         the dataset is missing, unreadable or too short
    ├── CheckpointError   a checkpoint is missing, incomplete or damaged
    ├── DivergenceError   the loss or the gradient is no longer a number
    ├── OutOfMemoryError  the device or the host has no memory left
    └── HostGoneError     one of several hosts goes away: the others start again without it, or with another

Everything else is `Unknown`. The name travels in the `failed` event and decides whether a retry makes sense.
"""


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
    name = "out_of_memory"
    exit_code = 68
    retryable = False


class HostGoneError(TrainerError):
    name = "host_gone"
    exit_code = 69


LEAVES = (SpecError, DataError, CheckpointError, DivergenceError, OutOfMemoryError, HostGoneError)


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
            return TrainerError(message)
        cause = cause.__cause__ or cause.__context__
    return SpecError(message)


def classify(error: BaseException) -> TrainerError:
    """The leaf that an arbitrary exception belongs to; the original stays its cause."""
    if isinstance(error, TrainerError):
        return error
    text = f"{type(error).__name__}: {error}"
    # torch raises its own OutOfMemoryError on a device and a plain RuntimeError ("can't allocate memory") on the host.
    # Libraries on the device say it in words of their own.
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or any(w in text for w in words):
        leaf: TrainerError = OutOfMemoryError(f"{text}. Use a smaller micro_batch, a higher ZeRO stage, or offload.")
    else:
        leaf = TrainerError(text)
    leaf.__cause__ = error
    return leaf
