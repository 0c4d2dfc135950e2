"""Which tokens an example has, and which of them are learnt."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finetune import made
from trainer.datasetconfig import ExamplesDataset
from trainer.errors import DataError, SpecError
from trainer.events import Prepared
from trainer.examples import BadExample, Chat, Example, Prompt, Text
from trainer.finetune.chat import PLAIN_TEMPLATE, end_of_turn
from trainer.finetune.tokens import Encoder, Tokens, cut
from trainer.prepare import digest, prepare
from trainer.prepared import Prepared as Files
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer, load_tokenizer


def dataset(**settings: Any) -> ExamplesDataset:
    return ExamplesDataset.model_validate({"files": ["x.jsonl"]} | settings)


def encode(example: Example, template: str | None = made.MARKED, **settings: Any) -> Tokens:
    return Encoder(made.tokenizer(template), dataset(**settings)).encode(example)


def chat(*messages: tuple[str, str], **more: Any) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in messages), None)


def learnt_text(tokens: Tokens, tokenizer: Any = None) -> list[str]:
    """The runs of learnt tokens, as text."""
    tokenizer = tokenizer or made.tokenizer()
    runs: list[list[int]] = []
    for index, (token, mark) in enumerate(zip(tokens.ids, tokens.marks, strict=True)):
        if mark and (index == 0 or not tokens.marks[index - 1]):
            runs.append([])
        if mark:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [made.MARKED, made.UNMARKED])
def test_labels_are_transformers_own(template: str) -> None:
    """Of a template without marks too: what its prefixes tell is what the marks of the same one with them say."""
    theirs = made.tokenizer(made.MARKED)
    for record in made.sums(30):
        expected = theirs.apply_chat_template(
            record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        found = encode(Chat(tuple(record["messages"]), None), template)
        assert found.ids == expected["input_ids"]
        assert found.marks == expected["assistant_masks"]


@pytest.mark.parametrize("template", [made.MARKED, made.UNMARKED])
def test_a_message_of_weight_0_is_not_learnt(template: str) -> None:
    messages: tuple[dict[str, Any], ...] = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four", "weight": 1},
    )
    assert learnt_text(encode(Chat(messages, None), template)) == ["four<|im_end|>"]


def test_tools_and_calls_reach_the_template_as_it_expects_them() -> None:
    template = (
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.tool_calls %}{% generation %}{{ m.tool_calls[0].function.arguments.city }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Delft"}'}}
    messages = ({"role": "user", "content": "rain?"}, {"role": "assistant", "tool_calls": [call]})
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    found = encode(Chat(messages, tools), template)
    assert made.tokenizer().decode(found.ids) == "[weather]<user>rain?<assistant>Delft"
    assert learnt_text(found) == ["Delft"]


def test_a_tokeniser_without_a_template_gets_the_plain_one() -> None:
    tokenizer = byte_tokenizer()
    example = chat(("system", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."))
    found = Encoder(tokenizer, dataset()).encode(example)
    text = "System:\nBe brief.\n\nUser:\nHello?\n\nAssistant:\nYes.<|endoftext|>\n\n"
    assert tokenizer.decode(found.ids) == text
    assert learnt_text(found, tokenizer) == ["Yes.<|endoftext|>"]
    asked = tokenizer.apply_chat_template(
        list(example.messages[:2]), chat_template=PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(asked)


def test_a_template_that_rewrites_what_came_before_is_refused_with_the_way_out() -> None:
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}"
        "{% else %}…{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(
        BadExample, match=r"messages\[1\], or it, otherwise when more follows.*generation.*train_on: all"
    ):
        encode(turns, forgetful)
    assert sum(encode(turns, forgetful, train_on="all").marks) == len(encode(turns, forgetful, train_on="all").ids) - 1
    assert learnt_text(encode(chat(("user", "a"), ("assistant", "b")), forgetful)) == ["b"]


def test_a_template_that_drops_the_reasoning_of_earlier_answers_is_followed() -> None:
    """As Qwen 3's does: with what the assistant was about to say, only in its last message."""
    reasoning = made.UNMARKED.replace(
        "{{ m.content }}<|im_end|>{%- else",
        "{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>{%- else",
    )
    assert "loop.last" in reasoning
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learnt_text(encode(turns, reasoning)) == ["b<|im_end|>", "<think></think>d<|im_end|>"]


def test_a_template_that_refuses_a_conversation_or_is_none_says_so() -> None:
    picky = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(BadExample, match="refuses the conversation: no system message"):
        encode(chat(("user", "a"), ("assistant", "b")), picky)
    assert end_of_turn(made.tokenizer(picky)) is None  # no reason not to export what was trained
    with pytest.raises(BadExample, match=r"several chat templates \(rag, tool_use\) and none is its default"):
        encode(chat(("user", "a"), ("assistant", "b")), {"rag": made.MARKED, "tool_use": made.MARKED})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="dataset.chat_template: is no template"):
        encode(chat(("user", "a"), ("assistant", "b")), "{% if %}")


def test_of_a_prompt_the_completion_is_learnt_with_the_end_of_text() -> None:
    found = encode(Prompt("What is 2 plus 2?", " 4."))
    assert made.tokenizer().decode(found.ids) == "What is 2 plus 2? 4.<|im_end|>"
    assert learnt_text(found) == [" 4.<|im_end|>"]


def test_of_a_text_all_is_learnt_but_its_first_token() -> None:
    found = encode(Text("What is 2 plus 2?"))
    assert found.marks == [0] + [1] * (len(found.ids) - 1)
    assert made.tokenizer().decode(found.ids) == "What is 2 plus 2?<|im_end|>"


def test_what_a_tokeniser_puts_first_comes_first_once(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = made.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    pair = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[pair]
    )
    encoder = Encoder(tokenizer, dataset())
    assert tokenizer.decode(encoder.encode(Prompt("a", "b")).ids) == "<|im_start|>ab<|im_end|>"
    assert tokenizer.decode(encoder.encode(Text("a")).ids) == "<|im_start|>a<|im_end|>"


def test_truncation() -> None:
    tokens = Tokens([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    assert cut(tokens, 5, "drop") == tokens
    assert cut(tokens, 4, "drop") is None
    assert cut(tokens, 3, "end") == Tokens([1, 2, 3], [0, 0, 1])
    assert cut(tokens, 3, "start") == Tokens([3, 4, 5], [0, 1, 1])
    only = cut(tokens, 2, "end")
    assert only is not None and not only.learns


# ---------------------------------------------------------------------------------------------------------- in a run


def prepared(directory: Path, records: list[dict[str, Any]], **settings: Any) -> tuple[Prepared, Files, RunDir]:
    import json

    file = made.write(directory / "examples.jsonl", records)
    wanted = made.spec(directory, dataset={"files": [str(file)], "validation_fraction": 0.0} | settings)
    rundir = RunDir(directory / "prepared")
    (event,) = [event for event in made.make(wanted, rundir) if isinstance(event, Prepared)]
    return event, Files(rundir.data, json.loads((rundir.data / "meta.json").read_text())), rundir


def prompt(words: int) -> dict[str, Any]:
    return {"prompt": "What is " * words, "completion": "4."}


def test_what_is_prepared_is_told_in_numbers(tmp_path: Path) -> None:
    lengths = [len(encode(Prompt(**prompt(words))).ids) for words in (1, 2, 3, 30)]
    event, files, _ = prepared(
        tmp_path, [prompt(1), prompt(2), prompt(3), prompt(30)], sequence_length=20, truncation="start"
    )
    assert event.examples == len(files) == 4
    assert event.truncated == 1 and event.left_out == 0
    assert event.longest == lengths[3] > 20
    assert event.median == (lengths[1] + lengths[2]) // 2
    assert event.tokens == sum(min(length, 20) for length in lengths) == sum(files.lengths)
    assert event.trained_tokens == sum(sum(marks) for _, marks in files)


def test_what_keeps_nothing_to_learn_is_left_out_and_counted(tmp_path: Path) -> None:
    event, _, _ = prepared(tmp_path, [prompt(1), prompt(30)], sequence_length=20, truncation="end")
    assert (event.examples, event.left_out) == (1, 1)


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([prompt(30)], {}, r"dataset.files: the files have no example to use: none of their 1 keeps .*truncation is"),
        ([prompt(1), prompt(30)], {"truncation": "refuse"}, r"examples.jsonl, line 2: has \d+ tokens, and dataset.seq"),
        ([prompt(1), {"prompt": "x"}], {}, r"examples.jsonl, line 2: completion is missing"),
        ([{"messages": []}], {"format": "chat"}, r"examples.jsonl, line 1: messages is missing or empty"),
        ([prompt(1)], {"validation_fraction": 0.5}, r"dataset.validation_fraction: of one example none"),
    ],
)
def test_what_cannot_be_used_names_file_line_and_reason(
    tmp_path: Path, records: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, records, **({"sequence_length": 20} | settings))


def test_another_number_of_examples_than_was_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="dataset.examples: 3 is given, but the files hold 2"):
        prepared(tmp_path, [prompt(1), prompt(2)], examples=3)


def test_columns_of_other_names_and_validation_files(tmp_path: Path) -> None:
    csv = tmp_path / "held.csv"
    csv.write_text("question,answer\n1 plus 1?,2\n")
    event, files, _ = prepared(
        tmp_path,
        [{"question": "2 plus 2?", "answer": "4"}],
        validation_files=[str(csv)],
        columns={"prompt": "question", "completion": "answer"},
    )
    assert (event.examples, event.held_out, len(files)) == (1, 1, 2)
    assert made.tokenizer().decode(files[1][0]) == "1 plus 1?2<|im_end|>"


def test_the_template_that_was_used_goes_with_the_run(tmp_path: Path) -> None:
    _, _, rundir = prepared(tmp_path, made.sums(3), chat_template=made.UNMARKED)
    assert load_tokenizer(str(rundir.tokenizer)).chat_template == made.UNMARKED


def test_a_prepared_run_directory_is_used_again_unless_the_tokens_would_be_others(tmp_path: Path) -> None:
    wanted, rundir = made.spec(tmp_path), RunDir(tmp_path / "run")
    first = made.make(wanted, rundir)
    stamp = (rundir.data / "tokens.bin").stat().st_mtime_ns
    again = made.make(made.spec(tmp_path, dataset={"packing": False}), rundir)
    assert (rundir.data / "tokens.bin").stat().st_mtime_ns == stamp
    told = [[e.model_dump(exclude={"at"}) for e in found if isinstance(e, Prepared)] for found in (first, again)]
    assert told[0] == told[1] and told[0]
    with pytest.raises(SpecError, match="dataset: .* was made from"):
        made.make(made.spec(tmp_path, dataset={"sequence_length": 64}), rundir)


def test_a_stop_while_tokenising_is_obeyed_and_the_next_start_makes_everything_anew(tmp_path: Path) -> None:
    wanted, rundir = made.spec(tmp_path), RunDir(tmp_path / "run")
    looks = iter([False, False, True])
    assert not prepare(wanted, rundir, 0, lambda _: None, lambda: next(looks))
    assert not (rundir.data / "meta.json").exists()
    undisturbed = RunDir(tmp_path / "other")
    for directory in (rundir, undisturbed):
        made.make(wanted, directory)
    assert digest(rundir) == digest(undisturbed)
    assert (rundir.data / "tokens.bin").read_bytes() == (undisturbed.data / "tokens.bin").read_bytes()
