"""Files of records, held against the libraries that write them, and what is said of the lines that are broken."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trainer import records as reading
from trainer.records import BadRecord, Record, count, records

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "label": "a"},
    {"text": 'quotes " and, commas\tand tabs', "label": "b"},
    {"text": "lines\nof a text\r\nas Windows has them", "label": "c"},
    {"text": "Ünïcödé 木 🌲", "label": ""},
]


def good(path: Path, kind: str | None = None, header: bool = True) -> list[dict[str, Any]]:
    found = list(records(path, kind, header))
    assert not [record for record in found if isinstance(record, BadRecord)]
    return [record.values for record in found if isinstance(record, Record)]


def bad(path: Path) -> dict[int, str]:
    return {record.line: record.reason for record in records(path) if isinstance(record, BadRecord)}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_read_as_json_has_them(tmp_path: Path, end: str, mark: bytes) -> None:
    content = mark + end.join(json.dumps(row) for row in ROWS).encode()
    path = written(tmp_path / "x.jsonl", content)
    assert good(path) == ROWS
    assert count(path) == len(ROWS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_is_read_as_the_standard_library_writes_it(tmp_path: Path, end: str, mark: str) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.DictWriter(file, ["text", "label"], lineterminator=end)
        writer.writeheader()
        writer.writerows(ROWS)
    assert good(path) == ROWS
    # Of a record of several lines the first one is told.
    assert [record.line for record in records(path)] == [2, 3, 4, 7]


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tsv", 'text\tlabel\na "word\t1\nb" c\t0\n')
    assert good(path) == [{"text": 'a "word', "label": "1"}, {"text": 'b" c', "label": "0"}]


def test_without_a_header_columns_are_numbered(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tsv", "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe sailors ridden.\n")
    assert [row["4"] for row in good(path, header=False)] == ["The sailors rode.", "The sailors ridden."]


def test_parquet_is_read_as_pyarrow_writes_it(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 1000
    table = pyarrow.table({"messages": messages, "n": list(range(1000))})
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    assert good(path) == table.to_pylist()
    assert [record.line for record in records(path)] == list(range(1, 1001))
    assert count(path) == 1000
    # Whatever it is called.
    assert good(path.rename(tmp_path / "upload")) == table.to_pylist()


def test_a_broken_line_is_told_and_the_next_one_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut',
        b"",
        b'{"text": "latin \xe4"}',
        b"[1, 2]",
        b"17",
        b"null",
        b'{"text": NaN}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud83c\\udf32 and \\u0000"}',
    ]
    path = written(tmp_path / "x.jsonl", b"\n".join(lines))
    assert [record.values["text"] for record in records(path) if isinstance(record, Record)] == ["fine", "🌲 and \0"]
    found = bad(path)
    assert sorted(found) == [2, 4, 5, 6, 7, 8, 9, 10, 11]
    for line, words in {
        2: "is not JSON: Unterminated string",
        4: "is not UTF-8: byte 0xe4 at position 17",
        5: "not a JSON object but an array",
        7: "null",
        8: "NaN",
        9: "surrogate",
        10: "nested too deeply",
    }.items():
        assert words in found[line]
    assert count(path) == 11


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_that_never_ends_is_not_held(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 1000)
    first, last = {"jsonl": ('{"text": "a"}', '{"text": "b"}'), "csv": ("text\na", "b")}[kind]
    path = written(tmp_path / f"x.{kind}", f"{first}\n{'x' * 5000}\n{last}\n")
    assert [record.values for record in records(path) if isinstance(record, Record)] == [{"text": "a"}, {"text": "b"}]
    assert list(bad(path)) == [2 if kind == "jsonl" else 3]


def test_broken_rows_are_told_and_the_next_one_read(tmp_path: Path) -> None:
    content = b'text,label\na,1\nb\nc,1,2\n\xe4,1\n"x"y,1\nd,0\n"never closed,1\n'
    path = written(tmp_path / "x.csv", content)
    assert [record.values["text"] for record in records(path) if isinstance(record, Record)] == ["a", "d"]
    found = bad(path)
    assert sorted(found) == [3, 4, 5, 6, 8]
    assert "1 fields, but there are 2 columns" in found[3]
    assert "UTF-8" in found[5]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    assert "twice" in bad(written(tmp_path / "x.csv", "a,a\n1,2\n3,4\n"))[1]


def test_damaged_parquet_is_told(tmp_path: Path) -> None:
    whole = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [os.urandom(50).hex() for _ in range(1000)]}), whole)
    content = whole.read_bytes()
    for damaged in (b"", b"PAR1", content[:-100], content[: len(content) // 2] + content[-8:], content[100:]):
        assert "is not Parquet" in bad(written(tmp_path / "y.parquet", damaged))[1]
    middle = len(content) // 2
    changed = content[:middle] + bytes(200) + content[middle + 200 :]
    for record in records(written(tmp_path / "y.parquet", changed)):
        assert isinstance(record, Record | BadRecord)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.csv", "x.tsv", "x"):
        assert good(written(tmp_path / name, "")) == []
