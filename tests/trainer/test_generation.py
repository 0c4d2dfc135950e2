"""What a model says here is what transformers' own `generate` says; what is shown of it is whole, and ends in time."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer.speech import speaking_model
from trainer.generation.generate import Penalties, generate
from trainer.generation.loaded import Loaded, Unanswerable, load, prompts_of
from trainer.generation.protocol import Directory, Sampling, Task
from trainer.generation.spoken import Spoken
from trainer.tokenizer import byte_tokenizer

PROMPT = "def generate("


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_model(tmp_path_factory.mktemp("speech") / "model")


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Loaded:
    return load(Directory(path=str(directory)), torch.device("cpu"))


def said(loaded: Loaded, prompt: str = PROMPT, **sampling: Any) -> tuple[list[str], str, int]:
    """(pieces, why it ended, tokens)"""
    pieces: list[str] = []
    (ids,) = prompts_of(Task(model=Directory(path=""), prompts=(prompt,), sampling=Sampling(**sampling)), loaded)
    reason, tokens = generate(loaded, ids, Sampling(**sampling), pieces.append, threading.Event())
    return pieces, reason, tokens


def transformers_says(directory: Path, prompt: str, tokens: int, **settings: Any) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"do_sample": False, "temperature": None, "top_k": 0} | settings
    out = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=256, **settings)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers(directory: Path, loaded: Loaded) -> None:
    pieces, reason, tokens = said(loaded, temperature=0, max_tokens=60)
    expected = transformers_says(directory, PROMPT, 60)
    assert len(set(expected)) > 5, "a text that says nothing compares nothing"
    assert "".join(pieces) == expected
    assert (reason, tokens) == ("length", 60)
    assert len(pieces) > 10, "it comes as it is made"


def test_sampled_text_is_that_of_transformers_with_the_same_seed(directory: Path, loaded: Loaded) -> None:
    for settings in ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.0}):
        torch.manual_seed(17)
        expected = transformers_says(directory, PROMPT, 40, do_sample=True, **settings)
        assert "".join(said(loaded, seed=17, max_tokens=40, **settings)[0]) == expected


def test_a_seed_makes_it_the_same_and_another_seed_does_not(loaded: Loaded) -> None:
    first, again, other = ("".join(said(loaded, seed=seed, max_tokens=40)[0]) for seed in (1, 1, 2))
    assert first == again != other
    assert "".join(said(loaded, max_tokens=40)[0]) != "".join(said(loaded, max_tokens=40)[0])


def test_generating_leaves_the_random_numbers_of_the_process_alone(loaded: Loaded) -> None:
    before = torch.get_rng_state()
    said(loaded, seed=3, max_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_ends_the_text_and_is_never_shown(loaded: Loaded, size: int) -> None:
    whole = "".join(said(loaded, temperature=0, max_tokens=60)[0])
    stop = whole[20 : 20 + size]
    pieces, reason, tokens = said(loaded, temperature=0, max_tokens=60, stop=("never said", stop))
    # One byte a token: longer ones lie across tokens.
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert (reason, tokens) == ("stop", whole.index(stop) + size)


def test_the_end_of_a_text_ends_it(directory: Path, loaded: Loaded) -> None:
    whole = "".join(said(loaded, temperature=0, max_tokens=30)[0])
    byte = whole[12]
    early = load(Directory(path=str(directory)), torch.device("cpu"))
    early = Loaded(early.model, early.tokenizer, early.context, frozenset({ord(byte)}))
    early.model.generation_config.eos_token_id = [ord(byte)]
    pieces, reason, tokens = said(early, temperature=0, max_tokens=30)
    assert ("".join(pieces), reason, tokens) == (whole[: whole.index(byte)], "stop", whole.index(byte) + 1)


def test_nothing_is_generated_for_a_client_that_has_gone(loaded: Loaded) -> None:
    gone, pieces = threading.Event(), []

    def give(text: str) -> None:
        pieces.append(text)
        gone.set()

    _, tokens = generate(loaded, list(PROMPT.encode()), Sampling(temperature=0, max_tokens=200), give, gone)
    assert tokens == len(pieces) == 1


def test_a_text_that_takes_too_long_ends_there(loaded: Loaded) -> None:
    pieces: list[str] = []

    def give(text: str) -> None:
        pieces.append(text)
        time.sleep(0.05)

    def ask(until: float) -> tuple[str, int]:
        sampling = Sampling(temperature=0, max_tokens=200)
        return generate(loaded, list(PROMPT.encode()), sampling, give, threading.Event(), until=until)

    reason, tokens = ask(time.monotonic() + 0.2)
    assert reason == "length" and 0 < tokens < 20 and len(pieces) == tokens
    assert ask(time.monotonic()) == ("length", 0)


def test_penalties_are_openais() -> None:
    ids, scores = torch.tensor([[5, 1, 2, 2, 2]]), torch.zeros(1, 6)
    # Token 5 is the prompt's.
    penalised = Penalties(prompt=1, presence=0.5, frequency=0.25)(ids, scores)  # type: ignore[arg-type]
    assert penalised.tolist() == [[0, -0.75, -1.25, 0, 0, 0]]


def test_a_penalty_keeps_a_model_from_saying_the_same(loaded: Loaded) -> None:
    plain, penalised = (
        "".join(said(loaded, temperature=0, max_tokens=80, frequency_penalty=penalty)[0]) for penalty in (0, 2)
    )
    assert len(set(penalised)) > len(set(plain))


# ------------------------------------------------------------------------------------------------------ text


MANY = "Grüße, 世界! 👩‍👩‍👧‍👦 naïve\u00a0test — ½ €5\n\ttabs  and  spaces"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """With words that bring their space, but for the first: as sentencepiece has them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_of_all = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=bytes_of_all, initial_alphabet=list("abcdefghijklm▁"))
    tokenizer.train_from_iterator(["the quick and the dead", "they came and went, the three"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
def test_pieces_are_whole_characters_and_together_what_the_tokeniser_decodes(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(MANY + " they and the three")["input_ids"]
    spoken = Spoken(lambda tokens: str(tokenizer.decode(tokens)))
    pieces = [spoken.add(token) for token in ids] + [spoken.end()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_goes_on_keeps_the_space_between(loaded: Loaded) -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer("the quick and the dead")["input_ids"]
    for cut in range(1, len(ids)):
        spoken = Spoken(lambda tokens: str(tokenizer.decode(tokens)), before=ids[:cut])
        rest = "".join([spoken.add(token) for token in ids[cut:]] + [spoken.end()])
        assert tokenizer.decode(ids[:cut]) + rest == "the quick and the dead"


def test_what_is_no_character_is_shown_as_such_when_the_text_ends() -> None:
    tokenizer = byte_tokenizer()
    spoken = Spoken(lambda tokens: str(tokenizer.decode(tokens)), stops=["xyz"])
    assert [spoken.add(token) for token in b"a\xe4\xb8"] == ["a", "", ""]
    assert spoken.end() == "\ufffd"
    held = Spoken(lambda tokens: str(tokenizer.decode(tokens)), stops=["xyz"])
    assert [held.add(token) for token in b"axy"] == ["a", "", ""]
    assert held.end() == "xy"


def test_of_two_stops_the_earlier_one_counts() -> None:
    tokenizer = byte_tokenizer()
    spoken = Spoken(lambda tokens: str(tokenizer.decode(tokens)), stops=["aab", "ab", "caa"])
    shown = "".join(spoken.add(token) for token in b"xcaab") + spoken.end()
    assert (shown, spoken.stopped) == ("x", True)


# ------------------------------------------------------------------------------------------------------ prompts


def task(**changes: Any) -> Task:
    return Task.model_validate({"model": {"type": "directory", "path": "/"}} | changes)


def test_messages_become_the_prompt_of_the_chat_template(loaded: Loaded) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}]
    (ids,) = prompts_of(task(messages=messages), loaded)
    assert bytes(ids).decode() == "[system] Be brief.\n[user] Grüße\n[assistant] "


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tool"),
        ({"prompts": [""]}, "prompt", "no token to begin with"),
        ({"prompts": [[1, 999]]}, "prompt", "token 999 is outside"),
        ({"prompts": ["x" * 300]}, "prompt", "maximum context length is 256"),
        ({"prompts": ["x"], "sampling": {"max_tokens": 256}}, "prompt", "1 of the prompt and 256"),
        ({"messages": [{"role": "user", "content": "y" * 300}]}, "messages", "maximum context length"),
    ],
)
def test_what_a_model_cannot_answer_is_refused_by_name(
    loaded: Loaded, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(Unanswerable, match=words) as refused:
        prompts_of(task(**changes), loaded)
    assert refused.value.param == param


def test_a_model_without_a_chat_template_takes_no_messages(tmp_path: Path) -> None:
    silent = load(Directory(path=str(speaking_model(tmp_path, template=None))), torch.device("cpu"))
    with pytest.raises(Unanswerable, match="no chat template; ask /v1/completions"):
        prompts_of(task(messages=[{"role": "user", "content": "hello"}]), silent)


def test_a_directory_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(Unanswerable, match="cannot be loaded"):
        load(Directory(path=str(tmp_path / "nothing")), torch.device("cpu"))
