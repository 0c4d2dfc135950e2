"""What every pod of the chart has: no root, no token, limits, probes, no secret in the open, commands that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from jobs.settings import Settings
from tests.deploy.chart import (
    CASES,
    CHART,
    Object,
    component,
    containers,
    environment,
    name,
    objects,
    of_kind,
    pods,
    rendered,
    template,
)

every_case = pytest.mark.parametrize("case", CASES)
OURS = ("api", "reaper", "worker", "migrations")


def test_the_api_has_the_credentials_of_a_store_only_where_files_are_there() -> None:
    for case, url in {"everything": "s3://bucket/files", "external": ""}.items():
        parts = rendered(case)
        for whose, pod in pods(parts):
            [container] = pod["spec"]["containers"]
            told = environment(container, parts)
            if (kind := component(pod["metadata"]["labels"])) in ("api", "worker"):
                assert told["STIEFEL_FILES_URL"] == url, whose
            has_some = {"worker", "generator"} | ({"api"} if url else set())
            assert ("AWS_SECRET_ACCESS_KEY" in told) == (kind in has_some), whose


@every_case
def test_no_container_is_root_or_can_become_it_or_writes_to_its_image(case: str) -> None:
    for whose, pod in pods(rendered(case)):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True, whose
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] > 0, whose
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, whose
        for container in containers(pod):
            # Nothing more, above all no user of its own.
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, whose
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), whose
        assert not [volume for volume in pod["spec"].get("volumes", []) if "hostPath" in volume], whose


@every_case
def test_no_pod_gets_a_token_or_variables_named_after_services(case: str) -> None:
    parts = rendered(case)
    for whose, pod in pods(parts):
        assert pod["spec"]["automountServiceAccountToken"] is False, whose
        # A service called stiefel-x would set STIEFEL_X_…, which are our settings' names.
        assert pod["spec"]["enableServiceLinks"] is False, whose
    for account in of_kind(parts, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@every_case
def test_every_container_says_what_it_needs_and_may_have(case: str) -> None:
    for whose, pod in pods(rendered(case)):
        for container in containers(pod):
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][bound].keys(), whose
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], f"{whose}: {volume['name']} could fill the node"


@every_case
def test_all_that_run_for_long_have_the_three_probes(case: str) -> None:
    for whose, pod in pods(rendered(case)):
        for container in pod["spec"]["containers"]:
            if not whose.startswith("Job/"):
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), whose


def test_a_database_that_is_away_is_no_reason_to_kill_anything() -> None:
    parts = rendered("external")
    for _, pod in pods(parts):
        for container in pod["spec"]["containers"]:
            for probe in ("startupProbe", "livenessProbe"):
                if probe in container and component(pod["metadata"]["labels"]) in OURS:
                    how = container[probe].get("httpGet", {}).get("path") or container[probe]["exec"]["command"]
                    assert how in ("/healthz", ["python", "-m", "worker.alive"])


@every_case
def test_secrets_stand_in_secrets_only(case: str) -> None:
    parts = rendered(case)
    secret = re.compile(r"password|secret|token(?!izer)|credential|api.?key|access_key", re.IGNORECASE)
    values = {value for part in of_kind(parts, "Secret") for value in part["stringData"].values()}
    for part in parts:
        if part["kind"] != "Secret":
            assert not [value for value in values if value in str(part)], name(part)
    for part in of_kind(parts, "ConfigMap"):
        assert not [key for key in part["data"] if secret.search(key)], name(part)
    for whose, pod in pods(parts):
        for container in containers(pod):
            for entry in container.get("env", []):
                if secret.search(entry["name"]):
                    assert "secretKeyRef" in entry["valueFrom"], f"{whose}: {entry['name']}"


@every_case
def test_what_pods_are_told_are_settings(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = rendered(case)
    known = {f"STIEFEL_{field.upper()}" for field in Settings.model_fields}
    for whose, pod in pods(parts):
        if component(pod["metadata"]["labels"]) not in OURS:
            continue
        for container in containers(pod):
            told = environment(container, parts)
            ours = {key: value for key, value in told.items() if key.startswith("STIEFEL_")}
            assert ours.keys() - known <= {"STIEFEL_REDIS_PASSWORD"}, whose
            with monkeypatch.context() as patch:
                for key, value in ours.items():
                    patch.setenv(key, value if isinstance(value, str) else "from-a-secret-of-yours")
                settings = Settings()
            if isinstance(ours["STIEFEL_DATABASE_URL"], str):
                url = make_url(settings.database_url)
                assert (url.drivername, url.password, url.database) == ("postgresql+psycopg", None, "stiefel")
                assert set(url.query) == {"sslmode"}
                assert "secretKeyRef" in told["PGPASSWORD"]


def test_the_generator_is_told_the_api_s_secret_and_nothing_of_the_service() -> None:
    parts = rendered("external")
    found = {component(pod["metadata"]["labels"]): pod["spec"]["containers"][0] for _, pod in pods(parts)}
    generator, api = (environment(found[name], parts) for name in ("generator", "api"))
    assert generator["STIEFEL_GENERATOR_SECRET"] == api["STIEFEL_GENERATOR_SECRET"]
    assert api["STIEFEL_GENERATOR_URL"] == "http://try-stiefel-generator:8001"
    assert not {"STIEFEL_DATABASE_URL", "STIEFEL_REDIS_URL", "PGPASSWORD"} & generator.keys()
    assert found["generator"]["resources"]["limits"]["nvidia.com/gpu"] == 1


@every_case
def test_workers_keep_the_service_s_secrets_from_trainers(case: str) -> None:
    # worker/launch.py leaves these out of a trainer's environment.
    kept = re.compile(r"STIEFEL_.*|PGPASSWORD")
    workers = [pod for _, pod in pods(rendered(case)) if component(pod["metadata"]["labels"]) == "worker"]
    assert workers
    for pod in workers:
        for container in containers(pod):
            for entry in container.get("env", []):
                source = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name", "")
                if re.search("database|broker|credentials|^stiefel$", source):
                    assert kept.fullmatch(entry["name"]), entry["name"]


@every_case
def test_a_worker_s_devices_are_what_it_asks_kubernetes_for(case: str) -> None:
    parts = rendered(case)
    names = set()
    for whose, pod in pods(parts):
        if component(pod["metadata"]["labels"]) != "worker":
            continue
        [container] = pod["spec"]["containers"]
        told = environment(container, parts)
        devices = {k: v for k, v in container["resources"]["limits"].items() if k not in ("cpu", "memory")}
        assert {k: v for k, v in container["resources"]["requests"].items() if k not in ("cpu", "memory")} == devices
        if told["STIEFEL_GPUS"] == "none":
            assert not devices
            assert int(told["STIEFEL_CPU_SLOTS"]) >= 1
        else:
            [number] = devices.values()
            assert told["STIEFEL_GPUS"] == ",".join(str(index) for index in range(number)), whose
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace >= float(told["STIEFEL_GRACE_SECONDS"]) + 30
        [memory] = [v["emptyDir"] for v in pod["spec"]["volumes"] if v["name"] == "shm"]
        assert memory["medium"] == "Memory"
        assert told["STIEFEL_ALIVE_FILE"].startswith("/tmp/")
        names.add(told["STIEFEL_WORKER"])
    assert len(names) == len([1 for _, pod in pods(parts) if component(pod["metadata"]["labels"]) == "worker"])


def test_a_pool_s_gpus_are_never_asked_for_twice_by_an_upgrade() -> None:
    for case in CASES:
        for part in of_kind(rendered(case), "Deployment"):
            if component(part["metadata"]["labels"]) == "worker":
                assert part["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
                grace = part["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
                assert part["spec"]["progressDeadlineSeconds"] > grace


@pytest.mark.parametrize(
    ("change", "restarted"),
    [
        ("settings: {graceSeconds: 60}", {"api", "reaper", "worker"}),
        ("api: {settings: {requestsPerMinute: 5}}", {"api"}),
        ("database: {password: another}", {"api", "reaper", "worker"}),
        ("commonLabels: {team: other}", set()),
        ("metrics: {serviceMonitor: {enabled: true, apiKeySecret: key}}", set()),
        ("api: {replicas: 5}", set()),
    ],
)
def test_pods_are_made_again_when_their_own_settings_change(change: str, restarted: set[str], tmp_path: Path) -> None:
    file = tmp_path / "change.yaml"
    file.write_text(change)
    done = template(CASES["bundled"], file)
    assert done.returncode == 0, done.stderr
    before, after = (dict(pods(parts)) for parts in (rendered("bundled"), objects(done.stdout)))
    assert {component(after[key]["metadata"]["labels"]) for key in after if after[key] != before[key]} == restarted


def test_a_new_version_of_the_chart_alone_restarts_no_training(tmp_path: Path) -> None:
    chart = tmp_path / "stiefel"
    shutil.copytree(CHART, chart)
    text = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(re.sub(r"^version: .*$", "version: 9.9.9", text, flags=re.MULTILINE))
    done = template(CASES["bundled"], chart=chart)
    assert done.returncode == 0, done.stderr
    assert "helm.sh/chart: stiefel-9.9.9" in done.stdout
    assert dict(pods(objects(done.stdout))) == dict(pods(rendered("bundled")))


def test_commands_and_their_options_are_those_of_the_programs() -> None:
    commands = {tuple(container["args"]) for container in _our_containers()}
    probes = {
        tuple(probe["exec"]["command"]) for c in _our_containers() if "exec" in (probe := c.get("livenessProbe", {}))
    }
    assert len(commands) == 6
    for program, *arguments in commands | probes:
        assert program == "python"
        options = [argument for argument in arguments if argument.startswith("--")]
        rest = arguments[: arguments.index(options[0])] if options else arguments
        done = subprocess.run([sys.executable, *rest, "--help"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not [option for option in options if option not in done.stdout], arguments


def _our_containers() -> list[Any]:
    found: list[Object] = []
    for case in CASES:
        for _, pod in pods(rendered(case)):
            if component(pod["metadata"]["labels"]) in (*OURS, "generator"):
                found += containers(pod)
    return found
