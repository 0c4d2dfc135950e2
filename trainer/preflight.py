"""What can be known of a spec by looking at this machine's files, before anything is queued. Imports no torch.

For a service that shares its file system with the trainers; a trainer makes the same checks again when it starts.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path

from trainer.config import TrainingSpec
from trainer.datasetconfig import Examples, HubDataset, StdlibDataset
from trainer.errors import DataError, SpecError
from trainer.files import find_files, stdlib_files
from trainer.methodcheck import rank_problem
from trainer.modelconfig import DirectoryModel
from trainer.presets import longest_of_directory, shape_of_directory


def preflight(spec: TrainingSpec, later: Collection[str] = ()) -> None:
    """Raises SpecError or DataError whose message begins with the field, a colon, and what to do.

    `later`: paths that need not be there yet, since whoever starts the trainer makes them before.
    """
    _check_dataset(spec, later)
    if isinstance(spec.model, DirectoryModel) and spec.model.path not in later:
        _check_model(spec, Path(spec.model.path))
    named = spec.tokenizer != "bytes" and spec.tokenizer.startswith(("/", ".")) and spec.tokenizer not in later
    if named and not Path(spec.tokenizer).is_dir():
        raise SpecError(f"tokenizer: there is no directory {spec.tokenizer!r}")


def _check_dataset(spec: TrainingSpec, later: Collection[str]) -> None:
    dataset = spec.dataset
    if isinstance(dataset, HubDataset):
        return
    if isinstance(dataset, Examples):
        if there := tuple(file for file in (*dataset.files, *dataset.validation_files) if file not in later):
            find_files(there)
        return
    if isinstance(dataset, StdlibDataset):
        check_length(_stdlib_tokens(), spec)
    elif not any(file in later for file in dataset.files):
        check_length(_most_tokens(find_files(dataset.files)), spec)


def _most_tokens(files: list[Path]) -> int:
    """No tokeniser makes more tokens than there are bytes, but for the mark at the end of each document; the documents
    of a JSONL file hold fewer characters than the file."""
    return sum(file.stat().st_size for file in files) + len(files)


@cache
def _stdlib_tokens() -> int:
    """Looked up once: it is a thousand files, and every submission asks."""
    return _most_tokens(stdlib_files())


def check_length(tokens: int, spec: TrainingSpec) -> tuple[int, int]:
    """(training, validation) sequences in a stream of `tokens`; DataError where one of them has none.

    The validation part is the end of the stream, whole sequences, at least one unless its fraction is 0.
    """
    length, fraction = spec.dataset.sequence_length, spec.dataset.validation_fraction
    sequences = tokens // length
    validation = max(1, round(sequences * fraction)) if fraction > 0 else 0
    training = sequences - validation
    if training < 1:
        need = (1 + (fraction > 0)) * length
        raise DataError(
            f"dataset.sequence_length: the dataset has at most {tokens} tokens; one training"
            f"{' and one validation' if fraction > 0 else ''} sequence of {length} need {need}; "
            "give more text or a shorter sequence_length"
        )
    return training, validation


def check_context(spec: TrainingSpec, longest: int | None) -> None:
    """Raises SpecError where the run's sequences are longer than what the model can read: tokens, None for any."""
    if longest is not None and spec.dataset.sequence_length > longest:
        raise SpecError(
            f"dataset.sequence_length: {spec.dataset.sequence_length} is above the {longest} tokens that the model can "
            f"read; choose at most {longest}"
        )


def _check_model(spec: TrainingSpec, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise SpecError(f"model.path: {str(path)!r} holds no config.json; give a Hugging Face model directory")
    shape = shape_of_directory(path)
    check_context(spec, longest_of_directory(path))
    problem = rank_problem(spec.method, shape, str(path)) if shape is not None else None
    if problem:
        raise SpecError(f"method.rank: {problem}")
