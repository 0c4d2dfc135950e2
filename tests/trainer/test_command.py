"""python -m trainer, as a person or a supervisor runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.alone import alone
from trainer import events
from trainer.checkpoint.place import Directory
from trainer.rundir import RunDir


def trainer(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


def make(directory: Path, name: str, **changes: Any) -> RunDir:
    rundir = RunDir(directory / name)
    rundir.root.mkdir()
    rundir.spec.write_text(alone(directory, **changes).model_dump_json())
    return rundir


def losses(rundir: RunDir) -> dict[int, float]:
    return {e.step: e.loss for e in events.read(rundir.events) if isinstance(e, events.Step)}


def wait_for_step(rundir: RunDir, step: int) -> None:
    deadline = time.monotonic() + 60
    while max(losses(rundir), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("ask", [pytest.param("file", marks=pytest.mark.matrix), "signal"])
def test_stopped_and_started_again_it_ends_with_the_losses_of_an_undisturbed_run(tmp_path: Path, ask: str) -> None:
    changes: dict[str, Any] = {"optimisation": {"steps": 120, "weight_decay": 0.1}, "checkpoints": {"every": 120}}
    straight, stopped = make(tmp_path, "straight", **changes), make(tmp_path, "stopped", **changes)
    subprocess.run(trainer("run", str(straight.root)), check=True, stdout=subprocess.DEVNULL)

    with subprocess.Popen(trainer("run", str(stopped.root)), stdout=subprocess.DEVNULL) as first:
        wait_for_step(stopped, 20)
        if ask == "file":
            stopped.stop.touch()
        else:
            first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 0
    last = events.read(stopped.events)[-1]
    assert isinstance(last, events.Stopped)
    assert 20 <= last.step < 120
    assert Directory(stopped.checkpoints).complete_steps() == [last.step]
    stopped.stop.unlink(missing_ok=True)
    subprocess.run(trainer("run", str(stopped.root)), check=True, stdout=subprocess.DEVNULL)
    assert losses(stopped) == losses(straight)
    assert isinstance(events.read(stopped.events)[-1], events.Finished)


def test_a_refused_spec_names_the_field_and_trains_nothing(tmp_path: Path) -> None:
    rundir = make(tmp_path, "bad")
    spec = json.loads(rundir.spec.read_text())
    spec["method"]["rank"] = 65
    rundir.spec.write_text(json.dumps(spec))
    done = subprocess.run(trainer("run", str(rundir.root)), capture_output=True, text=True)
    assert done.returncode == 64
    assert "method.rank: rank 65 is above the smallest side of q_proj" in done.stderr
    assert not rundir.events.exists()


def test_a_failure_is_an_event_and_an_exit_code(tmp_path: Path) -> None:
    rundir = make(tmp_path, "gone")
    (tmp_path / "text.txt").unlink()
    done = subprocess.run(trainer("run", str(rundir.root)), capture_output=True, text=True)
    assert done.returncode == 65
    failed = events.read(rundir.events)[-1]
    assert isinstance(failed, events.Failed)
    assert (failed.reason, failed.retryable) == ("bad_data", False)
    assert "nothing matches" in failed.message


def test_a_hub_that_cannot_be_reached_is_worth_another_try(tmp_path: Path) -> None:
    rundir = make(tmp_path, "hub", model={"hub": "some-organisation/some-model"}, tokenizer="bytes", method="full")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(trainer("run", str(rundir.root)), capture_output=True, text=True, env=offline)
    assert done.returncode == 72
    failed = events.read(rundir.events)[-1]
    assert isinstance(failed, events.Failed)
    assert (failed.reason, failed.retryable) == ("infrastructure", True)
    assert "'some-organisation/some-model' cannot be loaded" in failed.message


def test_two_ranks_keep_the_exit_code_and_stop_on_sigterm(tmp_path: Path) -> None:
    two: dict[str, Any] = {"resources": {"processes": 2}}
    gone = make(tmp_path, "gone", **two, dataset={"files": [str(tmp_path / "other.txt")]})
    (tmp_path / "other.txt").unlink(missing_ok=True)
    began = time.monotonic()
    assert subprocess.run(trainer("run", str(gone.root)), capture_output=True).returncode == 65
    # The rank that has not failed does not wait for the other: torchrun would kill it after thirty seconds.
    assert time.monotonic() - began < 25

    rundir = make(tmp_path, "stopped", **two, optimisation={"steps": 5000})
    with subprocess.Popen(trainer("run", str(rundir.root)), stdout=subprocess.DEVNULL) as launcher:
        wait_for_step(rundir, 5)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0
    assert isinstance(events.read(rundir.events)[-1], events.Stopped)
    assert len(Directory(rundir.checkpoints).complete_steps()) == 1
    assert not rundir.stop.exists()


def test_there_is_nothing_to_export_before_the_first_checkpoint(tmp_path: Path) -> None:
    rundir = make(tmp_path, "empty")
    done = subprocess.run(trainer("export", str(rundir.root), str(tmp_path / "out")), capture_output=True, text=True)
    assert done.returncode == 66
    assert "holds no complete checkpoint" in done.stderr


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    rundir = make(tmp_path, "orphan", optimisation={"steps": 5000})
    starter = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen({trainer('run', str(rundir.root))!r}, stdout=subprocess.DEVNULL,\n"
        "    env=os.environ | {'STIEFEL_PARENT_PID': str(os.getpid())})\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter]) as parent:
        wait_for_step(rundir, 5)
        parent.kill()
    deadline = time.monotonic() + 30
    while not isinstance(events.read(rundir.events)[-1], events.Stopped):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["export", "--help"], ["methods", "--help"]])
def test_help_has_an_example(command: list[str]) -> None:
    done = subprocess.run(trainer(*command), capture_output=True, text=True, check=True)
    assert "example:" in done.stdout or command == ["--help"]


def test_methods_as_json_are_schemas() -> None:
    done = subprocess.run(trainer("methods", "--json"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["galore"]["properties"]["period"]["minimum"] == 1
