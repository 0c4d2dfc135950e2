"""The bundled servers' commands and probes, tried with the real programs; and the order in which things start."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from cli.broker import find_server
from tests.deploy.chart import Object, component, containers, objects, of_kind, pods, rendered, template
from trainer.process import free_port


def of_component(case: str, wanted: str) -> Object:
    [pod] = [pod for _, pod in pods(rendered(case)) if component(pod["metadata"]["labels"]) == wanted]
    return pod


def test_the_bundled_broker_starts_asks_for_its_password_and_its_probe_notices(tmp_path: Path) -> None:
    programs = Path(find_server()).parent
    if not (programs / "valkey-cli").exists():
        pytest.skip(f"no valkey-cli in {programs}")
    [container] = of_component("bundled", "valkey")["spec"]["containers"]
    port = str(free_port())

    def here(text: str) -> str:
        return text.replace("/tmp", str(tmp_path)).replace("6379", port).replace("valkey-cli", f"valkey-cli -p {port}")

    def probe(password: str) -> int:
        command = [here(word) for word in container["livenessProbe"]["exec"]["command"]]
        return subprocess.run(command, env=told | {"VALKEY_PASSWORD": password}, timeout=20).returncode

    told = {"PATH": f"{programs}:{os.environ['PATH']}", "VALKEY_PASSWORD": "right"}
    command = [*container["command"], *(here(word) for word in container["args"])]
    with subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            deadline = time.monotonic() + 20
            while probe("right") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert probe("right") == 0
            assert probe("wrong") != 0
            assert "right" not in Path(f"/proc/{server.pid}/cmdline").read_text()
            assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0
        finally:
            server.kill()
    assert probe("right") != 0


def test_the_bundled_database_keeps_its_files_on_its_volume() -> None:
    [server] = [
        part for part in of_kind(rendered("bundled"), "StatefulSet") if "postgresql" in part["metadata"]["name"]
    ]
    [claim] = server["spec"]["volumeClaimTemplates"]
    [container] = server["spec"]["template"]["spec"]["containers"]
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == claim["metadata"]["name"]]
    [files] = [entry["value"] for entry in container["env"] if entry["name"] == "PGDATA"]
    # Below it: the volume's own directory belongs to root, and the server insists on one of its own.
    assert files.startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize("case", ["external", "keda", "minimal"])
def test_a_database_elsewhere_is_migrated_before_anything_is_made_or_replaced(case: str) -> None:
    parts = rendered(case)
    [job] = of_kind(parts, "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade,pre-rollback"
    assert "serviceAccountName" not in job["spec"]["template"]["spec"], "it would not be there yet"
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert "envFrom" not in container, "the ConfigMap would not be there yet"
    assert not [whose for whose, pod in pods(parts) if "initContainers" in pod["spec"]]


@pytest.mark.parametrize("case", ["bundled", "everything"])
def test_a_database_of_the_release_is_migrated_by_who_needs_its_schema(case: str) -> None:
    parts = rendered(case)
    assert not of_kind(parts, "Job")
    for part in parts:
        # What a hook waits for under --wait could never become ready without it.
        assert "helm.sh/hook" not in part["metadata"].get("annotations", {})
    for wanted in ("api", "reaper"):
        pod = of_component(case, wanted)
        [migrate] = pod["spec"]["initContainers"]
        [container] = pod["spec"]["containers"]
        assert migrate["args"] == ["python", "-m", "migrations"]
        assert migrate["image"] == container["image"]


def test_a_password_in_values_is_there_before_the_migrations_and_gone_after_them(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("database: {host: db, password: secret-of-test}\nbroker: {host: redis}\n")
    done = template(file)
    assert done.returncode == 0, done.stderr
    parts = objects(done.stdout)
    [job] = of_kind(parts, "Job")
    [container] = containers(job["spec"]["template"])
    reference = container["env"][0]["valueFrom"]["secretKeyRef"]
    [secret] = [part for part in of_kind(parts, "Secret") if part["metadata"]["name"] == reference["name"]]
    annotations = secret["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == job["metadata"]["annotations"]["helm.sh/hook"]
    assert int(annotations["helm.sh/hook-weight"]) < int(job["metadata"]["annotations"]["helm.sh/hook-weight"])
    assert "hook-succeeded" in annotations["helm.sh/hook-delete-policy"]
    # The release's own pods use another one, which is no hook.
    others = {name for name in _secrets_of_pods(parts) if name != reference["name"]}
    assert len(others) == 1


def _secrets_of_pods(parts: list[Object]) -> set[str]:
    return {
        entry["valueFrom"]["secretKeyRef"]["name"]
        for _, pod in pods(parts)
        for container in containers(pod)
        for entry in container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
