"""`stiefel up` brings a generator: small until somebody asks, ended and brought back with the rest."""

import json
from pathlib import Path

import psutil
from openai import OpenAI

from cli.stack import Stack
from tests.system.service import QUICK
from tests.trainer.speech import speaking_model


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_the_generator_of_the_stack_answers_and_is_small_before(tmp_path: Path) -> None:
    models = {"tiny": {"path": str(speaking_model(tmp_path / "tiny"))}}
    stack = Stack(tmp_path, port=0, environment=QUICK | {"STIEFEL_MODELS": json.dumps(models)}, generator=True)
    with stack, OpenAI(base_url=f"{stack.api_url}/v1", api_key="none", max_retries=10) as client:
        generator = stack.pid("generator")
        assert not has_torch(generator)
        assert "STIEFEL_REDIS_URL" not in psutil.Process(generator).environ()
        assert client.completions.create(model="tiny", prompt="def", max_tokens=3).choices[0].finish_reason == "length"
        assert has_torch(generator)
        stack.kill("generator")
        assert stack.revive() == ["generator"]
        assert client.completions.create(model="tiny", prompt="def", max_tokens=3).choices[0].text
    assert not psutil.pid_exists(generator)
