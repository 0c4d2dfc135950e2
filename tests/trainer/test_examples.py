"""What may be an example, and what is said of what may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.examples import BadExample, Chat, Labelled, Prompt, Text, check_columns, example_of, format_of, read
from trainer.records import Record

ASKED = {"role": "user", "content": "Which tree?"}
TOLD = {"role": "assistant", "content": "A larch."}


@pytest.mark.parametrize(
    ("values", "columns", "format"),
    [
        ({"messages": [ASKED, TOLD]}, {}, "chat"),
        ({"prompt": "a", "completion": "b", "text": "c"}, {}, "prompt"),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, "prompt"),
        ({"text": "a"}, {}, "text"),
        ({"text": "a", "label": 0}, {}, "labelled"),
        ({"text": "a", "label": None}, {}, "text"),
        ({"sentence": "a", "label": "b"}, {"text": "sentence"}, "labelled"),
        ({"messages": None, "text": "a"}, {}, "text"),
    ],
)
def test_the_format_is_that_of_the_fields(values: dict[str, Any], columns: dict[str, str], format: str) -> None:
    assert format_of(values, columns) == format


def test_fields_that_are_called_otherwise_are_named() -> None:
    with pytest.raises(BadExample, match=r"has the fields 'question', 'answer'; needed are 'messages'; 'prompt' and"):
        format_of({"question": "a", "answer": "b"}, {})


def test_a_conversation_is_kept_in_openais_shape() -> None:
    messages = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "tree?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}], "weight": 0},
        {"role": "tool", "content": "larch", "tool_call_id": "1"},
        TOLD | {"weight": 1.0},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    chat = example_of({"messages": messages, "tools": tools}, "chat", {})
    assert chat == Chat(
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which tree?"},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}], "weight": 0},
            {"role": "tool", "content": "larch", "tool_call_id": "1"},
            TOLD | {"weight": 1},
        ),
        tuple(tools),
    )
    # In a CSV file it is JSON in a column.
    written = {"messages": json.dumps(messages), "tools": json.dumps(tools)}
    assert example_of(written, "chat", {}) == chat


def test_the_other_formats() -> None:
    assert example_of({"q": "", "completion": "b"}, "prompt", {"prompt": "q"}) == Prompt("", "b")
    assert example_of({"text": "a\0b"}, "text", {}) == Text("a\0b")
    assert example_of({"text": "a", "pair": "b", "label": 1}, "labelled", {}) == Labelled("a", "b", "1")
    labels = [0, 1.0, 2.5, True, "x", None]
    found = [example_of({"text": "a", "label": label}, "labelled", {}) for label in labels]
    assert [one.label for one in found if isinstance(one, Labelled)] == ["0", "1", "2.5", "true", "x", None]


@pytest.mark.parametrize(
    ("values", "format", "words"),
    [
        ({"messages": []}, "chat", "messages is missing or empty"),
        ({"messages": "hello"}, "chat", "messages is a string and not JSON"),
        ({"messages": {"role": "user"}}, "chat", "messages is an object of 1, not an array"),
        ({"messages": ["hello"]}, "chat", r"messages\[0\] is 'hello', not an object"),
        ({"messages": [ASKED]}, "chat", "none with role 'assistant'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "chat", r"messages\[0\].role is 'bot'; choose among system"),
        ({"messages": [{"role": [], "content": "a"}]}, "chat", "role is an array"),
        ({"messages": [{"content": "a"}]}, "chat", "role is None"),
        ({"messages": [TOLD, {"role": "user"}]}, "chat", r"messages\[1\].content is missing"),
        ({"messages": [TOLD, {"role": "assistant"}]}, "chat", r"messages\[1\].content is missing"),
        ({"messages": [{"role": "user", "content": 7}]}, "chat", "content is 7, not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "chat",
            r"content\[0\] is an object of 1; parts may only be text",
        ),
        ({"messages": [ASKED | {"weight": 1}]}, "chat", "weight is 1; only the assistant's"),
        ({"messages": [TOLD | {"weight": 0.5}]}, "chat", "weight is 0.5"),
        ({"messages": [TOLD | {"weight": True}]}, "chat", "weight is True"),
        ({"messages": [TOLD], "tools": [1]}, "chat", r"tools\[0\] is 1"),
        ({"prompt": "a", "completion": ""}, "prompt", "completion is empty"),
        ({"prompt": "a"}, "prompt", "completion is missing"),
        ({"prompt": 3, "completion": "a"}, "prompt", "prompt is 3, not a string"),
        ({"text": ""}, "text", "text is empty"),
        ({"text": "a", "label": [1]}, "labelled", "label is an array of 1"),
        ({"text": "a", "label": ""}, "labelled", "label is ''"),
        ({"text": "a", "pair": 1, "label": "b"}, "labelled", "pair is 1"),
    ],
)
def test_what_is_wrong_is_said_by_field(values: dict[str, Any], format: str, words: str) -> None:
    with pytest.raises(BadExample, match=words):
        example_of(values, format, {})


def test_an_error_can_be_stored_whatever_the_value() -> None:
    with pytest.raises(BadExample) as caught:
        format_of({"\0" * 50: 1, "\ud800": 2, "木" * 500: 3}, {})
    assert "\0" not in str(caught.value)
    str(caught.value).encode()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("columns", [{"question": "prompt"}, {"text": ""}, {"text": "a\0"}, {"text": "x" * 201}])
def test_columns_that_cannot_be_are_refused(columns: dict[str, str]) -> None:
    with pytest.raises(BadExample):
        check_columns(columns)


def test_columns_by_number_are_those_of_a_file_without_a_header(tmp_path: Path) -> None:
    path, columns = tmp_path / "x.tsv", {"text": "4", "label": "2"}
    path.write_text("gj04\t1\t\tThe sailors rode.\n")
    [record] = read(path, columns)
    assert isinstance(record, Record)
    assert example_of(record.values, "labelled", columns) == Labelled("The sailors rode.", None, "1")
