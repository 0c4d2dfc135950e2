"""stiefel, as a person types it, against a running stack."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.submit import BadFile, body
from tests.conftest import job_body
from tests.system.service import QUICK, Service, running

STIEFEL = str(Path(sys.executable).with_name("stiefel"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("cli")) as started:
        yield started


def stiefel(service: Service, *arguments: str, fails: bool = False) -> str:
    environment = os.environ | {"STIEFEL_API": service.stack.api_url, "COLUMNS": "200"}
    done = subprocess.run([STIEFEL, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == (1 if fails else 0), done.stderr
    return done.stderr if fails else done.stdout


def test_submit_and_watch_to_the_end(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_body()))
    shown = stiefel(service, "submit", str(file), "--name", "watched", "--set", "optimisation.seed=3", "--watch")
    found = re.search(r"job-[0-9a-f]+", shown)
    assert found is not None
    assert "succeeded" in shown
    assert "step 20/20" in shown
    job = json.loads(stiefel(service, "show", found[0], "--json"))
    assert job["name"] == "watched"
    assert job["spec"]["optimisation"]["seed"] == 3
    assert found[0] in stiefel(service, "jobs", "--state", "succeeded")
    assert "finished after" in stiefel(service, "logs", found[0])
    assert "succeeded" in stiefel(service, "show", found[0])


def test_watch_as_json_prints_every_step_and_then_the_job(service: Service) -> None:
    job_id = service.submit(optimisation={"steps": 6})
    lines = [json.loads(line) for line in stiefel(service, "watch", job_id, "--json").splitlines()]
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["state"] == "succeeded"


def test_pause_resume_and_cancel(service: Service) -> None:
    job_id = service.submit(optimisation={"steps": 5000})
    service.wait_for_step(job_id, 3)
    assert "will pause at the next step" in stiefel(service, "pause", job_id)
    service.wait(job_id, "paused")
    stiefel(service, "resume", job_id)
    service.wait(job_id, "running")
    assert json.loads(stiefel(service, "cancel", job_id, "--json"))["cancel_requested_at"] is not None
    service.wait_until(job_id, lambda job: job["state"] == "cancelled")


def test_refusals_are_one_sentence(service: Service) -> None:
    refused = stiefel(service, "submit", "--rank", "4000", fails=True)
    assert "method.rank" in refused or "rank 4000 is above" in refused
    assert "Traceback" not in refused
    assert "there is no job 'job-x'" in stiefel(service, "show", "job-x", fails=True)
    assert "there is no job 'job-x'" in stiefel(service, "watch", "job-x", fails=True)
    assert "there is no job 'job-x'" in stiefel(service, "watch", "job-x", "--json", fails=True)
    away = stiefel(service, "jobs", "--api", "http://127.0.0.1:9", fails=True)
    assert "start the service with `stiefel up`" in away


def test_a_name_with_brackets_is_only_a_name(service: Service) -> None:
    job_id = service.submit(name="[/x] [bold]")
    assert "[/x] [bold]" in stiefel(service, "jobs")
    stiefel(service, "cancel", job_id)


def test_methods(service: Service) -> None:
    assert "arXiv:2403.03507" in stiefel(service, "methods")


@pytest.mark.parametrize(
    "command", ["up", "demo", "submit", "watch", "jobs", "show", "cancel", "pause", "resume", "logs", "methods"]
)
def test_help_has_an_example(command: str) -> None:
    done = subprocess.run([STIEFEL, command, "--help"], capture_output=True, text=True, check=True)
    assert "example" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_up_leaves_no_process_behind_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    environment = os.environ | QUICK
    command = [STIEFEL, "up", "--home", str(tmp_path / "a home"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as up:
        assert up.stdout is not None
        url = re.search(r"http://[0-9.:]+", up.stdout.readline())
        assert url is not None
        children = psutil.Process(up.pid).children(recursive=True)
        assert len(children) >= 4
        up.send_signal(number)
        up.wait(30)
    deadline = time.monotonic() + 30
    while alive := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_up_says_when_its_port_is_taken(service: Service, tmp_path: Path) -> None:
    port = str(service.stack.port)
    refused = stiefel(service, "up", "--home", str(tmp_path), "--port", port, fails=True)
    assert f"port {port}" in refused


BODIES: list[tuple[dict[str, Any], list[str], str, Any]] = [
    ({"model": "llama-9m"}, [], "model", {"preset": "llama-9m"}),
    ({"model": "org/name"}, [], "model", {"hub": "org/name"}),
    ({"model": "/"}, [], "model", {"path": "/"}),
    ({"method.name": "full"}, [], "method", {"name": "full"}),
    ({"method.rank": 8}, [], "method", {"name": "galore", "rank": 8}),
    ({}, ["deepspeed.offload=cpu", "deepspeed.zero_stage=3"], "deepspeed", {"offload": "cpu", "zero_stage": 3}),
]


@pytest.mark.parametrize(("flags", "settings", "key", "expected"), BODIES)
def test_flags_become_a_body(flags: dict[str, Any], settings: list[str], key: str, expected: Any) -> None:
    assert body(None, flags, settings)[key] == expected


def test_files_are_made_absolute_and_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert body(None, {"dataset": "*.jsonl"}, [])["dataset"] == {"source": "jsonl", "files": [f"{tmp_path}/*.jsonl"]}
    with pytest.raises(BadFile, match="nothing matches"):
        body(None, {"dataset": "b.txt"}, [])
    with pytest.raises(BadFile, match="has no '='"):
        body(None, {}, ["steps"])
