"""stiefel keys, workers and delete, against a service that asks for API keys."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.stack import Stack
from tests.system.service import QUICK


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("keys")
    with Stack(home, port=0, environment=QUICK | {"STIEFEL_AUTH": "on"}) as started:
        yield started


def stiefel(stack: Stack, *arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"STIEFEL_HOME": str(stack.home), "STIEFEL_API": stack.api_url, "COLUMNS": "150"}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=environment | ({"STIEFEL_API_KEY": key} if key else {}),
        capture_output=True,
        text=True,
    )


def create(stack: Stack, *arguments: str) -> dict[str, Any]:
    done = stiefel(stack, "keys", "create", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


SUBMIT = ("submit", "--model", "llama-tiny", "--dataset", "python-stdlib", "--method", "full", "--steps", "3", "--json")


def test_a_key_opens_the_service_until_it_is_revoked(stack: Stack) -> None:
    refused = stiefel(stack, *SUBMIT)
    assert refused.returncode == 1
    assert "no API key" in refused.stderr
    made = create(stack, "--name", "team [a]", "--queued", "9", "--device-hours", "2.5")
    assert made["key"].startswith(f"sk-stiefel-{made['id']}-")
    assert (made["scopes"], made["max_queued"], made["max_device_hours"]) == (["write"], 9, 2.5)
    submitted = stiefel(stack, *SUBMIT, "--watch", key=made["key"])
    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout.splitlines()[-1])
    assert (job["state"], job["owner"]) == ("succeeded", made["id"])

    assert stiefel(stack, "keys", "set", made["id"], "--device-hours", "7").returncode == 0
    assert "of 7" in stiefel(stack, "keys", "list").stdout
    assert stiefel(stack, "keys", "set", made["id"], "--device-hours", "2.5").returncode == 0
    listed = stiefel(stack, "keys", "list")
    assert "team [a]" in listed.stdout
    assert "of 2.5" in listed.stdout
    assert made["key"] not in listed.stdout + stiefel(stack, "keys", "list", "--json").stdout

    assert f"{job['id']} is deleted" in stiefel(stack, "delete", job["id"], key=made["key"]).stdout
    assert stiefel(stack, "show", job["id"], key=made["key"]).returncode == 1
    assert stiefel(stack, "keys", "revoke", made["id"]).returncode == 0
    again = stiefel(stack, "jobs", key=made["key"])
    assert (again.returncode, "unknown or revoked" in again.stderr) == (1, True)
    assert "revoked" in stiefel(stack, "keys", "list").stdout


def test_an_unknown_key_cannot_be_revoked(stack: Stack) -> None:
    done = stiefel(stack, "keys", "revoke", "nothing")
    assert done.returncode == 1
    assert "there is no API key 'nothing'; `stiefel keys list` lists them" in done.stderr


def test_without_a_database_the_remedy_is_told_and_nothing_is_made(stack: Stack, tmp_path: Path) -> None:
    def keys_list(url: str) -> str:
        environment = os.environ | {"STIEFEL_HOME": str(tmp_path / "none"), "STIEFEL_DATABASE_URL": url}
        command = [sys.executable, "-m", "cli.main", "keys", "list"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        return " ".join(done.stderr.split())

    assert "stiefel.db; set STIEFEL_DATABASE_URL, or STIEFEL_HOME" in keys_list("")
    assert not (tmp_path / "none").exists()
    empty = tmp_path / "empty.db"
    empty.touch()
    assert "no such table: api_keys; run `python -m migrations`" in keys_list(f"sqlite:///{empty}")
    away = keys_list("postgresql+psycopg://me:hush@127.0.0.1:1/none")
    assert "me:***@127.0.0.1" in away
    assert "hush" not in away


def test_an_administrator_drains_a_worker(stack: Stack) -> None:
    admin, user = (create(stack, "--name", s, "--scope", s)["key"] for s in ("admin", "write"))
    listed = stiefel(stack, "workers", "list", key=user)
    assert "worker-1" in listed.stdout
    refused = stiefel(stack, "workers", "drain", "worker-1", key=user)
    assert (refused.returncode, "scope admin; yours has read, write" in refused.stderr) == (1, True)
    drained = stiefel(stack, "workers", "drain", "worker-1", "--stop-job", key=admin)
    assert "worker-1 is idle and takes no new job" in drained.stdout
    assert "drained" in stiefel(stack, "workers", "list", key=user).stdout
    undrained = stiefel(stack, "workers", "undrain", "worker-1", "--json", key=admin)
    assert json.loads(undrained.stdout)["drained"] is False
    unknown = stiefel(stack, "workers", "drain", "nobody", key=admin)
    assert "there is no worker 'nobody'" in unknown.stderr


COMMANDS = (
    "keys create",
    "keys list",
    "keys set",
    "keys revoke",
    "workers list",
    "workers drain",
    "workers undrain",
    "delete",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(stack: Stack, command: str) -> None:
    done = stiefel(stack, *command.split(), "--help")
    assert done.returncode == 0
    assert "example" in done.stdout
