"""The unmodified openai client talks to models, through a real API and a real generator."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import keys, models
from jobs.keys import Quotas, Scope
from jobs.states import State
from tests.generation.service import Talk, talking
from trainer.exporting import tidy
from trainer.exports.export import export

HELLO: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    with talking(tmp_path_factory.mktemp("talk")) as opened:
        yield opened


@pytest.fixture
def client(talk: Talk) -> Iterator[OpenAI]:
    with talk.client() as opened:
        yield opened


def transformers_says(directory: Path, prompt: str, tokens: int) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=tokens, pad_token_id=256, do_sample=False, temperature=None, top_k=0)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_an_answer_is_what_transformers_makes_of_the_templates_prompt(talk: Talk, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, **GREEDY)
    assert "not" not in raw.headers["stiefel-notice"] and "trainer export" in raw.headers["stiefel-notice"]
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    prompt = "[system] Be kind.\n[user] Grüße\n[assistant] "
    assert answer.choices[0].message.content == transformers_says(talk.directory, prompt, 40)
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "length")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage is not None
    expected = len(prompt.encode())
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (expected, 40, expected + 40)


def test_a_stream_brings_the_same_in_pieces_and_its_usage_last(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options, **GREEDY)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert set(reasons[:-1]) == {None} and reasons[-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_as_the_protocol_has_it(talk: Talk) -> None:
    body = {"model": "tiny", "messages": HELLO, "stream": True} | GREEDY
    headers = {"authorization": f"Bearer {talk.key}"}
    answer = httpx.post(f"{talk.api_url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


def test_completions_continue_a_prompt_streamed_or_not(talk: Talk, client: OpenAI) -> None:
    expected = transformers_says(talk.directory, "def f(", 30)
    settings: Any = {"model": "tiny", "prompt": "def f(", "temperature": 0, "max_tokens": 30}
    answer = client.completions.create(**settings)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        expected,
        "length",
    )
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **settings)) == expected
    by_ids = client.completions.create(**settings | {"prompt": list(b"def f(")})
    assert by_ids.choices[0].text == expected
    several = client.completions.create(**settings | {"prompt": ["def f(", "class A"], "n": 2})
    assert [choice.text for choice in several.choices[:2]] == [expected, expected]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    sixteen = client.completions.create(model="bare", prompt="x", temperature=0)
    assert sixteen.usage is not None and sixteen.usage.completion_tokens == 16


def test_a_seed_repeats_an_answer_and_choices_differ(client: OpenAI) -> None:
    def ask(seed: int, n: int = 1) -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed, n=n, max_completion_tokens=20, top_p=0.9
        )
        return [choice.message.content for choice in answer.choices]

    first = ask(7, n=2)
    assert first[0] != first[1]
    assert ask(7) == first[:1] != ask(8)


def test_a_stop_string_ends_an_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY).choices[0].message.content or ""
    stop = whole[15:18]
    answer = client.chat.completions.create(model="tiny", messages=HELLO, stop=[stop, "§"], **GREEDY)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    turn: Any = [*HELLO, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Go on."}]}]
    assert client.chat.completions.create(model="tiny", messages=turn, **GREEDY).choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"n": 5}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"max_tokens": 9000}, "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages.0"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"model": "bare"}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: OpenAI, changes: dict[str, Any], param: str) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO} | changes
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert (refused.value.param or "").startswith(param)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_what_asks_for_nothing_is_accepted(client: OpenAI) -> None:
    neutral: Any = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "user": "me", "tools": []}
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, parallel_tool_calls=True, **neutral)


def test_a_model_that_is_not_there_or_not_ready_is_not_found(talk: Talk, client: OpenAI) -> None:
    running = talk.job(State.RUNNING, (2,))
    other = keys.create(talk.database, "other", [Scope.WRITE], Quotas())[1]
    for name in ("ft:llama-tiny::0123456789abcdef0123", models.name_of(running), "ft:nonsense", "new", "no-such/model"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model=name, messages=HELLO)
        assert (missing.value.code, missing.value.response.headers["x-should-retry"]) == ("model_not_found", "false")
    with pytest.raises(openai.NotFoundError), talk.client(api_key=other) as stranger:
        stranger.chat.completions.create(model=models.name_of(running, 2), messages=HELLO)


def test_a_directory_is_only_opened_where_jobs_may_read(talk: Talk, client: OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client.completions.create(model=str(talk.directory), prompt="x")
    assert refused.value.param == "model"


def test_without_a_key_that_may_write_nothing_is_said(talk: Talk) -> None:
    with pytest.raises(openai.AuthenticationError), talk.client(api_key="sk-stiefel-wrong") as client:
        client.chat.completions.create(model="tiny", messages=HELLO)
    reader = keys.create(talk.database, "reader", [Scope.READ], Quotas())[1]
    with pytest.raises(openai.PermissionDeniedError), talk.client(api_key=reader) as client:
        client.chat.completions.create(model="tiny", messages=HELLO)


def test_a_client_that_goes_away_ends_its_generation(talk: Talk, client: OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=8000, temperature=0)
    next(iter(stream))
    stream.close()
    talk.until(lambda: talk.health()["requests"] == 0, "the generation to end")
    # One that waits for the whole answer, likewise.
    with pytest.raises(openai.APITimeoutError), talk.client(timeout=0.15, max_retries=0) as hasty:
        hasty.completions.create(model="tiny", prompt="def f(", max_tokens=8000, n=1, seed=1)
    talk.until(lambda: talk.health()["requests"] == 0, "the generation to end")
    assert (talk.home / "generator.log").read_text().count("the client has gone after") == 2


def test_more_than_may_wait_are_told_to_come_back(talk: Talk, client: OpenAI) -> None:
    long: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 8000, "n": 4, "seed": 5, "stream": True}
    first = client.chat.completions.create(**long)
    next(iter(first))
    with talk.client() as second, ThreadPoolExecutor(1) as aside:
        waiting = aside.submit(second.completions.create, model="tiny", prompt="x")
        talk.until(lambda: talk.health()["requests"] == 2, "a second request to wait")
        with pytest.raises(openai.InternalServerError) as busy, talk.client(max_retries=0) as third:
            third.completions.create(model="tiny", prompt="x")
        assert (busy.value.status_code, busy.value.code) == (503, "generator_busy")
        assert int(busy.value.response.headers["retry-after"]) > 0
        first.close()
        assert waiting.result(60).choices[0].text
    talk.until(lambda: talk.health()["requests"] == 0, "the generation to end")


def test_a_finished_job_and_a_checkpoint_of_it_speak_as_their_exports_do(
    talk: Talk, client: OpenAI, tmp_path: Path
) -> None:
    name, rundir = talk.trained()
    for step, model in ((4, name), (2, f"{name}:ckpt-step-2")):
        said = client.completions.create(model=model, prompt="def f(", temperature=0, max_tokens=20)
        assert rundir.export(step).is_dir()
        export(rundir, tmp_path / str(step), checkpoint=str(step))
        assert said.choices[0].text == transformers_says(tmp_path / str(step), "def f(", 20)
        # The one that is in memory stays.
        tidy(rundir.root.parent, 0)
        assert [path.name for path in sorted(rundir.exports.glob("step-*[0-9]"))] == [f"step-0000000{step}"]


def test_a_generator_that_is_gone_is_said_to_be(talk: Talk) -> None:
    talk.generator.terminate()
    talk.generator.wait(30)
    with (
        pytest.raises(openai.InternalServerError, match="cannot be reached") as away,
        talk.client(max_retries=0) as one,
    ):
        one.completions.create(model="tiny", prompt="x")
    assert away.value.status_code == 503
