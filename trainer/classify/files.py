"""Labelled examples out of files, with where they stand. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from trainer import glue
from trainer.datasetconfig import LabelledDataset
from trainer.errors import DataError
from trainer.examplefiles import Place, each_example
from trainer.examples import BadExample, Labelled, example_of
from trainer.files import find_files
from trainer.records import BadRecord, Record, records

# In MNLI's first files: the annotators could not agree.
_NO_LABEL = "-"


def each_labelled(dataset: LabelledDataset, field: str) -> Iterator[tuple[Place, Labelled]]:
    """Those of the dataset's `field`, files or validation_files, in order. Raises DataError with file and line."""
    if dataset.glue is not None:
        yield from _each_of_glue(dataset.glue, dataset, field)
        return
    for place, example in each_example(dataset, field, "labelled"):
        assert isinstance(example, Labelled)
        yield place, example


def _each_of_glue(task: str, dataset: LabelledDataset, field: str) -> Iterator[tuple[Place, Labelled]]:
    for file in find_files(getattr(dataset, field)):
        try:
            columns: dict[str, str] | None = None
            for record in _records(file, task):
                place = Place(field, file, record.line)
                if isinstance(record, BadRecord):
                    raise place.wrong(record.reason)
                columns = columns or glue.columns_of(task, record.values)
                if columns is None:
                    wanted = "; or ".join(", ".join(form.values()) for form in glue.TASKS[task].files)
                    raise place.wrong(f"is no file of GLUE's {task}, which has the columns {wanted}")
                try:
                    example = example_of(record.values, "labelled", columns)
                except BadExample as error:
                    raise place.wrong(error.reason) from error
                assert isinstance(example, Labelled)
                if example.label == "-1":
                    raise place.wrong("has the label -1, which stands for none: test sets of GLUE cannot be trained on")
                if example.label != _NO_LABEL:
                    yield place, example
        except OSError as error:
            raise DataError(f"dataset.{field}: {file} cannot be read: {error}") from error


def _records(file: Path, task: str) -> Iterator[Record | BadRecord]:
    if _is_numbered(file, task):
        return records(file, header=False)
    return records(file)


def _is_numbered(file: Path, task: str) -> bool:
    """Whether the file has no header, as CoLA's; so it is where its first line names no columns of the task."""
    first = next(iter(records(file, header=False)), None) if file.suffix.lower() in (".tsv", ".csv") else None
    if not isinstance(first, Record):
        return False
    named = {str(value): None for value in first.values.values()}
    return glue.columns_of(task, named) is None and glue.columns_of(task, first.values) is not None
