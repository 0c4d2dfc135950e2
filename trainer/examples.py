"""What a record may be: a conversation, a prompt with its completion, a text, a text with a label. Imports no torch.

`columns` says what a field is called in a file where that is not its own name: {"prompt": "question"}. A null counts as
a field that is not there, since columns of Parquet files have one for every row.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.records import BadRecord, Record, records

# What each format needs, in the order in which they are looked for, and what it may have besides.
NEEDED = {"chat": ("messages",), "prompt": ("prompt", "completion"), "labelled": ("text", "label"), "text": ("text",)}
ALLOWED = {"chat": ("tools",), "prompt": (), "labelled": ("pair",), "text": ()}
FORMATS = tuple(NEEDED)
FIELDS = tuple(dict.fromkeys(field for format in FORMATS for field in (*NEEDED[format], *ALLOWED[format])))

# OpenAI's newer name for the system's voice is not known to chat templates.
_ROLES = {role: role for role in ("system", "user", "assistant", "tool", "function")} | {"developer": "system"}


@dataclass(frozen=True)
class Chat:
    """Messages in OpenAI's shape, with plain text as content; an assistant's may have a weight of 0 or 1."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True)
class Prompt:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Labelled:
    text: str
    pair: str | None
    label: str | None  # of a file to predict there is none


Example = Chat | Prompt | Text | Labelled


class BadExample(Exception):
    @property
    def reason(self) -> str:
        return str(self)


def read(path: Path, columns: Mapping[str, str], kind: str | None = None) -> Iterator[Record | BadRecord]:
    """A file's records. Columns that are all called by numbers, from 1, are those of a CSV or TSV without a header."""
    numbered = bool(columns) and all(column.isdecimal() for column in columns.values())
    return records(path, kind, header=not numbered)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises BadExample for a field that no example has, and for a name that no column can have."""
    for field, column in columns.items():
        if field not in FIELDS:
            raise BadExample(f"{_shown(field)} is no field of an example; choose among {', '.join(FIELDS)}")
        if not 0 < len(column) <= 200 or re.search("[\0\ud800-\udfff]", column):
            raise BadExample(f"{field}: {_shown(column)} is no name of a column; give 1 to 200 characters")


def format_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """chat, prompt, labelled or text: the first one of these whose fields are there. Raises BadExample."""
    for format, needed in NEEDED.items():
        if all(_get(values, field, columns) is not None for field in needed):
            return format
    wanted = "; ".join(" and ".join(repr(columns.get(field, field)) for field in needed) for needed in NEEDED.values())
    there = ", ".join(_shown(name) for name in list(values)[:10]) or "none"
    raise BadExample(f"has the fields {there}; needed are {wanted}. Where they are called otherwise, say so in columns")


def example_of(values: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> Example:
    """Raises BadExample with the field and what is wrong with it."""
    if format == "chat":
        return _chat(values, columns)
    if format == "prompt":
        completion = _text(values, "completion", columns)
        return Prompt(_text(values, "prompt", columns, may_be_empty=True), completion)
    if format == "labelled":
        pair = None if _get(values, "pair", columns) is None else _text(values, "pair", columns, may_be_empty=True)
        return Labelled(_text(values, "text", columns), pair, _label(_get(values, "label", columns)))
    return Text(_text(values, "text", columns))


def _get(values: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> Any:
    return values.get(columns.get(field, field))


def _text(values: Mapping[str, Any], field: str, columns: Mapping[str, str], may_be_empty: bool = False) -> str:
    value, name = _get(values, field, columns), columns.get(field, field)
    if value is None:
        raise BadExample(f"{name} is missing")
    if not isinstance(value, str):
        raise BadExample(f"{name} is {_shown(value)}, not a string")
    if not value and not may_be_empty:
        raise BadExample(f"{name} is empty")
    return value


def _label(value: Any) -> str | None:
    """As a class's name: 1, 1.0 and "1" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value == value and abs(value) < float("inf")):
        return str(value)
    if not isinstance(value, str) or not value:
        raise BadExample(f"label is {_shown(value)}; give a string or a number")
    return value


def _chat(values: Mapping[str, Any], columns: Mapping[str, str]) -> Chat:
    messages = _list(values, "messages", columns)
    if not messages:
        raise BadExample("messages is missing or empty; give at least one of the user's and one of the assistant's")
    checked = tuple(_message(f"messages[{place}]", message) for place, message in enumerate(messages))
    if not any(message["role"] == "assistant" for message in checked):
        raise BadExample("messages has none with role 'assistant', so there is nothing to learn")
    tools = _list(values, "tools", columns)
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadExample(f"tools[{place}] is {_shown(tool)}, not an object")
    return Chat(checked, tuple(tools) or None)


def _list(values: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> list[Any]:
    """In a file whose columns hold text alone it is written as JSON."""
    value = _get(values, field, columns)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadExample(f"{field} is a string and not JSON: {_shown(value)}") from error
    if value is not None and not isinstance(value, list):
        raise BadExample(f"{field} is {_shown(value)}, not an array")
    return value or []


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadExample(f"{where} is {_shown(message)}, not an object")
    kept = {name: value for name, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadExample(f"{where}.role is {_shown(role)}; choose among {', '.join(_ROLES)}")
    kept["role"] = _ROLES[role]
    if "content" in kept:
        kept["content"] = _content(f"{where}.content", kept["content"])
    elif role != "assistant" or not (kept.get("tool_calls") or kept.get("function_call")):
        raise BadExample(f"{where}.content is missing")
    if "weight" in kept:
        weight = kept["weight"]
        if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise BadExample(f"{where}.weight is {_shown(weight)}; only the assistant's may have one, 0 or 1")
        kept["weight"] = int(weight)
    return kept


def _content(where: str, content: Any) -> str:
    """A string, or OpenAI's list of parts, as far as they are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadExample(f"{where} is {_shown(content)}, not a string")
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadExample(f"{where}[{place}] is {_shown(part)}; parts may only be text here")
    return "".join(part["text"] for part in content)


def _shown(value: Any) -> str:
    """The value as far as an error needs it, in characters that every log and database takes."""
    if isinstance(value, list | dict):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value if not isinstance(value, str) else value[:60])
    return text if len(text) <= 80 else text[:77] + "…"
