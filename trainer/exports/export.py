"""A run's checkpoint as a directory for others, in one of three formats."""

from collections.abc import Callable
from pathlib import Path

from trainer.errors import SpecError
from trainer.exports.adapter import write_adapter
from trainer.exports.destination import Destination, bytes_of, new_directory
from trainer.exports.factored import write_factored
from trainer.exports.merged import write_merged
from trainer.exports.trained import Trained, trained_by
from trainer.model import DTYPES
from trainer.rundir import RunDir

FORMATS: dict[str, Callable[[Trained, Destination], None]] = {
    "merged": write_merged,
    "peft": write_adapter,
    "factored": write_factored,
}


def export(
    rundir: RunDir,
    out: Path,
    form: str = "merged",
    checkpoint: str = "newest",
    shard_size: str = "5GB",
    dtype: str | None = None,
) -> int:
    """Write a checkpoint's model, and the run's tokeniser, to `out`; returns the step. One process, on the CPU.

    `form`, `checkpoint`, `shard_size` and `dtype` are the command's options; the dtype is by default the run's own.
    Raises CheckpointError where there is no such checkpoint, SpecError where the method has no such format or `out`
    holds something already.
    """
    shard_bytes = bytes_of(shard_size)
    if form not in FORMATS:
        raise SpecError(f"--format: {form!r} is unknown; choose one of {', '.join(FORMATS)}")
    with new_directory(out) as directory, trained_by(rundir, checkpoint) as trained:
        wanted = DTYPES[dtype or trained.spec.optimisation.dtype]
        FORMATS[form](trained, Destination(directory, out, shard_bytes, wanted))
        trained.tokenizer.save_pretrained(directory)
        return trained.step
