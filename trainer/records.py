"""Records of a file with where they stand: JSON lines, CSV, TSV, Parquet. Imports no torch.

A record that cannot be read is yielded too, as a `BadRecord`, and the next one follows: who checks a file counts them,
who trains raises the first. Of a file of lines no more than `MOST_BYTES` of one record are held in memory; of a Parquet
file it is a batch of rows.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

# Of one line, and of one field of a CSV file.
MOST_BYTES = 16 * 2**20
_ROWS = 64  # of a Parquet file at a time

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}

# Of the whole process; the default of 128 KB is less than a long document.
csv.field_size_limit(MOST_BYTES)


@dataclass(frozen=True)
class Record:
    line: int  # of the file, from 1; of a Parquet file the row
    values: dict[str, Any]


class BadRecord(Exception):
    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(f"line {line}: {reason}")


def kind_of(path: Path) -> str:
    """By its suffix, else by its first bytes: Parquet, or JSON lines. Raises OSError."""
    if kind := KINDS.get(path.suffix.lower()):
        return kind
    with path.open("rb") as file:
        return "parquet" if file.read(4) == b"PAR1" else "jsonl"


def records(path: Path, kind: str | None = None, header: bool = True) -> Iterator[Record | BadRecord]:
    """In order; empty lines are passed over. Raises OSError.

    `kind`: jsonl, csv, tsv or parquet; default: by the file. TSV knows no quotes, as its standard has it. CSV and TSV
    without a header have columns called 1, 2, 3, ….
    """
    kind = kind or kind_of(path)
    if kind == "parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        yield from _json_lines(file) if kind == "jsonl" else _separated(file, kind, header)


def count(path: Path, kind: str | None = None, header: bool = True) -> int:
    """How many records there are, good and bad. Raises OSError."""
    kind = kind or kind_of(path)
    if kind == "jsonl":
        with path.open("rb") as file:
            return sum(1 for _, line in _Lines(file) if line is None or line.strip())
    return sum(1 for _ in records(path, kind, header))


class _Lines:
    """Number and bytes of each line, its end included; None where it is too long. The first without its byte-order
    mark."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.number = file, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> tuple[int, bytes | None]:
        line = self._file.readline(MOST_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MOST_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MOST_BYTES)
            return self.number, None
        return self.number, line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line


_TOO_LONG = f"is longer than {MOST_BYTES:,} bytes; cut the example into several"


def _json_lines(file: BinaryIO) -> Iterator[Record | BadRecord]:
    for number, line in _Lines(file):
        if line is None:
            yield BadRecord(number, _TOO_LONG)
        elif line.strip():
            try:
                yield Record(number, _object(line))
            except _NotReadable as error:
                yield BadRecord(number, str(error))


class _NotReadable(Exception):
    pass


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip(b"\r\n").decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise _NotReadable(f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise _NotReadable(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise _NotReadable("is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _NotReadable(f"is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise _NotReadable(f"is not a JSON object but {_JSON_NAMES[type(value)]}; write one object a line")
    # Half of a surrogate pair can be written as \ud800 and is no text: tokenisers refuse it.
    if b"\\u" in line:
        _check_text(value)
    return value


_JSON_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
_JSON_NAMES |= {type(None): "null"}


def _no_number(name: str) -> NoReturn:
    raise _NotReadable(f"is not JSON: {name} is no number of it; use null")


def _check_text(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise _NotReadable(f"has half of a surrogate pair, \\u{code:04x}, which is no character") from error


def _separated(file: BinaryIO, kind: str, header: bool) -> Iterator[Record | BadRecord]:
    lines = _Text(file)
    rows: Any
    if kind == "csv":
        rows = csv.reader(lines, strict=True)
    else:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names: list[str] | None = None
    while True:
        first = lines.number + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except _NotReadable as error:
            yield BadRecord(lines.number, str(error))
            continue
        except csv.Error as error:
            yield BadRecord(first, f"is not {kind.upper()}: {error}")
            continue
        if not row:
            continue
        try:
            " ".join(row).encode()
        except UnicodeEncodeError:
            yield BadRecord(first, "is not UTF-8")
            continue
        if names is None:
            names = row if header else [str(place) for place in range(1, len(row) + 1)]
            if len(set(names)) < len(names):
                yield BadRecord(first, "the header names a column twice; without a header, give columns by number")
                return
            if header:
                continue
        if len(row) == len(names):
            yield Record(first, dict(zip(names, row, strict=True)))
        else:
            yield BadRecord(first, f"has {len(row)} fields, but there are {len(names)} columns")


class _Text:
    """Lines as text. What is no UTF-8 is marked by surrogates, for the row that it is in to be refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _Lines(file)

    @property
    def number(self) -> int:
        return self._lines.number

    def __iter__(self) -> "_Text":
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        if line is None:
            raise _NotReadable(_TOO_LONG)
        return line.decode(errors="surrogateescape")


def _parquet(path: Path) -> Iterator[Record | BadRecord]:
    # Not needed for the other kinds, and slow to import.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(number, values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield BadRecord(number + 1, f"is not Parquet that can be read: {_first_line(error)}")
    except OSError as error:
        if error.errno is not None:
            raise
        # Arrow's own word for damage of many kinds.
        yield BadRecord(number + 1, f"is not Parquet that can be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
