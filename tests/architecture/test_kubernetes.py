"""The example for Kubernetes: what its parts call one another, and that the commands in it are understood."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from trainer.config import TrainingSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "kubernetes" / "two-hosts.yaml"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(EXAMPLE.read_text())}


def script(parts: dict[str, Any]) -> str:
    [container] = parts["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-ec"]
    [text] = container["args"]
    return str(text)


def torchrun(parts: dict[str, Any]) -> Any:
    """What torchrun makes of its arguments. It refuses what it does not know."""
    line = script(parts).replace("\\\n", " ").split("exec torchrun ")[1].splitlines()[0]
    return get_args_parser().parse_args(shlex.split(line))


def test_every_pod_has_an_index_and_finds_the_first_by_the_service_s_name(parts: dict[str, Any]) -> None:
    job, service = parts["Job"], parts["Service"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    host, _, port = torchrun(parts).rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert f"getent hosts {host}" in script(parts)


def test_the_job_the_launcher_and_the_spec_mean_as_many_hosts(parts: dict[str, Any]) -> None:
    job, resources = (
        parts["Job"]["spec"],
        TrainingSpec.model_validate_json(parts["ConfigMap"]["data"]["spec.json"]).resources,
    )
    given = torchrun(parts)
    assert job["completions"] == job["parallelism"] == resources.hosts
    assert (given.nnodes, given.nproc_per_node) == (str(resources.hosts), str(resources.processes))
    assert given.rdzv_backend == "c10d"
    assert given.max_restarts > 0


def test_a_drained_host_has_longer_than_its_ranks(parts: dict[str, Any]) -> None:
    pod = parts["Job"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > torchrun(parts).shutdown_timeout
    [container] = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_what_is_mounted_is_there_and_written_by_all(parts: dict[str, Any]) -> None:
    pod = parts["Job"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes.keys()
    assert volumes["spec"]["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]
    claim = parts["PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("index", ["0", "1"])
def test_the_pod_s_script_starts_torchrun_on_a_prepared_run_directory(
    parts: dict[str, Any], tmp_path: Path, index: str
) -> None:
    # Paths are moved below a directory of ours; torchrun and getent only say what they were called with.
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "spec.json").write_text(parts["ConfigMap"]["data"]["spec.json"])
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("torchrun", "getent"):
        (commands / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (commands / name).chmod(0o755)
    text = script(parts).replace("/spec/", f"{tmp_path}/spec/").replace("/runs/", f"{tmp_path}/runs/")
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index, "POD_IP": "10.0.0.7"}
    done = subprocess.run(["bash", "-ec", text], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("torchrun --nnodes 2")
    assert f"is_host={1 - int(index)}," in command
    assert "--local-addr 10.0.0.7" in command
    assert command.endswith(f"-m trainer run {tmp_path}/runs/first")
    assert [file.name for file in (tmp_path / "runs" / "first").iterdir()] == ["spec.json"]
