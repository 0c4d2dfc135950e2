"""Documents of a dataset, one string at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

from trainer.access import Access, check_data_files
from trainer.datasetconfig import HubDataset, JsonlDataset, StdlibDataset, Stream, TextDataset
from trainer.errors import DataError
from trainer.files import find_files, stdlib_files

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}


def documents(dataset: Stream) -> Iterator[str]:
    """Every document, in a fixed order. Raises DataError that names the file and the line."""
    if isinstance(dataset, StdlibDataset):
        # A handful of library files are kept in other encodings on purpose; they are no use as text.
        yield from (text for text in map(_text_or_none, stdlib_files()) if text)
    elif isinstance(dataset, TextDataset):
        yield from (_text(file) for file in find_files(dataset.files))
    elif isinstance(dataset, JsonlDataset):
        for file in find_files(dataset.files):
            yield from _json_lines(file, dataset.field)
    else:
        yield from _hub(dataset)


def _text_or_none(file: Path) -> str | None:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError:
        return None


def _text(file: Path) -> str:
    _refuse_packed(file)
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.files: {file} is not UTF-8 at byte {error.start}; convert it first") from error
    except OSError as error:
        raise DataError(f"dataset.files: {file} cannot be read: {error.strerror}") from error


def _refuse_packed(file: Path) -> None:
    """Nothing is unpacked here: a small archive may hold more than any disk."""
    try:
        with file.open("rb") as opened:
            head = opened.read(6)
    except OSError as error:
        raise DataError(f"dataset.files: {file} cannot be read: {error.strerror}") from error
    kind = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), None)
    if kind is not None:
        raise DataError(f"dataset.files: {file} is packed ({kind}); unpack it first")


def _json_lines(file: Path, field: str) -> Iterator[str]:
    _refuse_packed(file)
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field_of(line, field, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset.files: {file} cannot be read as UTF-8 text: {error}") from error


def _field_of(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"dataset.files: {where} is not JSON: {error.msg} at column {error.colno}") from error
    value = record.get(field) if isinstance(record, dict) else None
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"dataset.field: {where} holds half of a surrogate pair, which is no text; repair the line")
    if not isinstance(value, str):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"dataset.field: {where} has no text under {field!r}; it has {keys}")
    return value


def _hub(dataset: HubDataset) -> Iterator[str]:
    from datasets import load_dataset, load_dataset_builder

    try:
        limits = Access.of_environment()
        if limits.readable is not None:
            # A repository may name files of whoever reads it.
            described = load_dataset_builder(dataset.name, dataset.configuration).config.data_files or {}
            check_data_files((str(file) for files in described.values() for file in files), limits)
        rows = load_dataset(dataset.name, dataset.configuration, split=dataset.split, streaming=True)
        if dataset.documents is not None:
            rows = rows.take(dataset.documents)
        for number, row in enumerate(rows):
            if not isinstance(row.get(dataset.field), str):
                raise DataError(
                    f"dataset.field: row {number} has no text under {dataset.field!r}; it has {sorted(row)}"
                )
            yield row[dataset.field]
    except (FileNotFoundError, ValueError) as error:  # the library's own "not found" errors are of the first kind
        raise DataError(f"dataset.name: {dataset.name!r} cannot be loaded: {error}") from error
