"""Every example of a run's files, with where it stands. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.datasetconfig import Examples
from trainer.errors import DataError, SpecError
from trainer.examples import BadExample, Example, check_columns, example_of, format_of, read
from trainer.files import find_files
from trainer.records import BadRecord


@dataclass(frozen=True)
class Place:
    """The `field` of the spec that named `file`, and the line or row of the example in it."""

    field: str
    file: Path
    line: int

    def wrong(self, reason: str) -> DataError:
        return DataError(f"dataset.{self.field}: {self.file}, line {self.line}: {reason}")


def each_example(dataset: Examples, field: str, format: str) -> Iterator[tuple[Place, Example]]:
    """Those of the dataset's `field`, files or validation_files, in order.

    `format`: chat, prompt, text, labelled, or auto: what the first example of all is, a text where it also has a label.
    Raises DataError that names the file and the line, SpecError for columns that cannot be.
    """
    try:
        check_columns(dataset.columns)
    except BadExample as error:
        raise SpecError(f"dataset.columns: {error.reason}") from error
    for file in find_files(getattr(dataset, field)):
        try:
            for record in read(file, dataset.columns):
                place = Place(field, file, record.line)
                if isinstance(record, BadRecord):
                    raise place.wrong(record.reason)
                try:
                    if format == "auto":
                        format = format_of(record.values, dataset.columns).replace("labelled", "text")
                    yield place, example_of(record.values, format, dataset.columns)
                except BadExample as error:
                    raise place.wrong(error.reason) from error
        except OSError as error:
            raise DataError(f"dataset.{field}: {file} cannot be read: {error}") from error
