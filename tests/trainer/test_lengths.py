"""Tokens of a file's examples, against what transformers counts and what training learns."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.bytecount import count_bytes
from trainer.datasetconfig import ExamplesDataset
from trainer.errors import SpecError
from trainer.examination import counter
from trainer.examples import BadExample, Chat, Example, Labelled, Prompt, Text, example_of
from trainer.finetune.tokens import Encoder
from trainer.lengths import FileTokens, Lengths
from trainer.tokenizer import byte_tokenizer

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["<|endoftext|>", "a<|endoftext|>", "<|endof", "\r\n\t", "🌲木", "<<|>|>"]
)
FULL = TEXTS.filter(bool)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS | st.just('{"ü": [1, "<"]}')})}
)
USER = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool", "developer"]), "content": TEXTS})
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS},
    optional={"weight": st.sampled_from([0, 1]), "tool_calls": st.lists(CALLS, max_size=2)},
)
CHATS = st.fixed_dictionaries(
    {"messages": st.builds(lambda some, last: [*some, last], st.lists(USER | ASSISTANT, max_size=4), ASSISTANT)},
    optional={"tools": st.lists(st.fixed_dictionaries({"type": TEXTS}), max_size=2)},
).map(lambda values: example_of(values, "chat", {}))
EXAMPLES = (
    CHATS
    | st.builds(Prompt, TEXTS, FULL)
    | st.builds(Text, FULL)
    | st.builds(Labelled, FULL, st.none() | TEXTS, st.none())
)
BYTES = byte_tokenizer()
ENCODER = Encoder(BYTES, ExamplesDataset(files=("-",)))


def as_training_does(example: Example) -> tuple[int, int | None] | None:
    """None where nothing is learnt."""
    if isinstance(example, Labelled):
        pair = [] if example.pair is None else [example.pair]
        return len(BYTES(example.text, *pair)["input_ids"]), None
    tokens = ENCODER.encode(example)
    return (len(tokens.ids), sum(tokens.marks)) if tokens.learns else None


@settings(max_examples=400, deadline=None)
@given(EXAMPLES)
def test_bytes_are_counted_as_their_tokeniser_does(example: Example) -> None:
    try:
        found = count_bytes(example)
    except BadExample:
        found = None
    assert found == as_training_does(example)


TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{{ raise_exception('no\\0system') }}{% endif -%}
{{- '<' + message['role'] + '>' -}}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif -%}
{%- endfor -%}
"""


def saved(directory: Path) -> PreTrainedTokenizerFast:
    """A tokeniser as models bring one: byte-level BPE with merges, and a chat template that refuses system messages."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator(["Which tree is it? A larch, I think. The larch loses its needles."] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


CHAT = [{"role": "user", "content": "Which tree is it?"}, {"role": "assistant", "content": "A larch, I think."}]


def test_a_tokeniser_s_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "tokenizer")
    chats = [CHAT, CHAT + CHAT, [*CHAT, {"role": "user", "content": "Ünïcödé 🌲?"}, CHAT[1]]]
    refused = [{"role": "system", "content": "Be brief."}, *CHAT]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, refused]))
    command = [sys.executable, "-m", "trainer", "examine", str(path), "--json", "--count", str(tmp_path / "tokenizer")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: list[Any] = [
        tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True) for chat in chats
    ]
    lengths = [len(one["input_ids"]) for one in told]
    assert json.loads(done.stdout)["statistics"]["tokens"] == {
        "tokenizer": str(tmp_path / "tokenizer"),
        "tokens": sum(lengths),
        "trained_tokens": sum(sum(one["assistant_masks"]) for one in told),
        "shortest": min(lengths),
        "median": median(lengths),
        "longest": max(lengths),
        "not_counted": 1,
        "not_counted_because": "the chat template refuses the conversation: no\ufffdsystem",
    }


def test_whoever_asks_for_a_tokeniser_is_told_what_it_refuses(tmp_path: Path) -> None:
    saved(tmp_path)
    refused = Chat(({"role": "system", "content": "Be brief."}, *CHAT), None)
    with pytest.raises(BadExample, match="the chat template refuses"):
        Lengths(counter(str(tmp_path))).add(refused)


def test_a_file_of_which_nothing_can_be_counted_says_so() -> None:
    tokens = FileTokens("bytes", count_bytes)
    tokens.add(Chat(({"role": "assistant", "content": "a", "weight": 0},), None))
    assert tokens.result()["tokens"] == {
        "tokenizer": "bytes",
        "tokens": 0,
        "not_counted": 1,
        "not_counted_because": "no token of it is learnt",
    }


def test_bytes_need_no_library_and_others_name_theirs(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "tokenizers", "jinja2"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name={name!r})\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from trainer.examination import counter\nfrom trainer.examples import Text\n"
        "print(counter('bytes')(Text('abc')))\ncounter('gpt2')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(4, 3)\n"
    assert "'gpt2' needs transformers, which is not installed here; pip install 'stiefel[tokenizers]'" in done.stderr


def test_a_tokeniser_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be loaded"):
        counter(str(tmp_path))


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', "[" * 100_000], ids=["half a pair", "brackets"])
def test_calls_that_cannot_be_written_out_are_not_counted_and_no_error(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    odd = Chat(tuple(messages), None)
    plain = Chat((messages[0], {"role": "assistant", "content": "b"}), None)
    measure = FileTokens("bytes", count_bytes)
    for example in (odd, plain):
        measure.add(example)
    found = measure.result()["tokens"]
    assert found["tokens"] >= count_bytes(plain)[0]
    assert found.get("not_counted", 0) == (1 if "ud800" in arguments else 0)
