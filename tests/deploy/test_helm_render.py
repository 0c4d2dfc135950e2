"""What the chart renders: the same with Helm 3 and 4, valid by Kubernetes' own schemas, wired without loose ends."""

import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import (
    CASES,
    CHART,
    Object,
    component,
    containers,
    name,
    objects,
    of_kind,
    pods,
    rendered,
    run_helm,
    selects,
    template,
    text,
)

MAJORS = (3, 4)
# The oldest that Chart.yaml allows, and the newest whose schemas are here.
KUBERNETES = ("1.27", "1.37")
OTHERS = {"TriggerAuthentication", "ServiceMonitor", "PrometheusRule"}  # not Kubernetes' own
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("major", MAJORS)
def test_helm_has_nothing_to_complain_of(case: str, major: int) -> None:
    done = run_helm(major, "lint", "--strict", CHART, "--values", CASES[case])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@every_case
def test_helm_3_and_helm_4_render_the_same(case: str) -> None:
    assert rendered(case, 3) == rendered(case, 4)


@every_case
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_schemas_accept_every_object(case: str, version: str) -> None:
    for part in rendered(case):
        if part["kind"] == "ScaledJob":
            # What KEDA makes of it.
            part = {"apiVersion": "batch/v1", "kind": "Job", "spec": part["spec"]["jobTargetRef"]}
        if part["kind"] not in OTHERS:
            kubernetes_validate.validate(part, version, strict=True)


def test_examples_of_the_chart_s_readme_are_accepted(tmp_path: Path) -> None:
    readme = (CHART / "README.md").read_text()
    external, keda = tmp_path / "external.yaml", tmp_path / "keda.yaml"
    external.write_text(readme.split("<<END\n")[1].split("END\n")[0])
    keda.write_text("workers:" + readme.split("```\nworkers:")[1].split("```")[0])
    for files in ([external], [external, keda], [CASES["bundled"]]):
        done = template(*files)
        assert done.returncode == 0, done.stderr


def test_the_chart_allows_the_versions_it_is_checked_with() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


@every_case
def test_names_are_said_once_and_nothing_is_left_blank(case: str) -> None:
    names = [name(part) for part in rendered(case)]
    assert sorted(set(names)) == sorted(names)
    assert not [line for line in text(case).splitlines() if line and not line.strip()]


@every_case
def test_the_longest_names_leave_room_for_what_kubernetes_adds(case: str, tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    values = yaml.safe_load(CASES[case].read_text())
    values["workers"] = [
        pool | {"name": f"p{number}" + "x" * 17} for number, pool in enumerate(values.get("workers", []))
    ]
    long.write_text(yaml.safe_dump(values | {"fullnameOverride": "y" * 60}))
    done = template(long)
    assert done.returncode == 0, done.stderr
    for part in objects(done.stdout):
        # A Job of KEDA's has six signs more, and its name is a label's value, of which 63 are allowed.
        assert len(part["metadata"]["name"]) <= 57, name(part)


@every_case
def test_selectors_find_their_own_pods_and_no_others(case: str) -> None:
    parts = rendered(case)
    labels = {whose: pod["metadata"]["labels"] for whose, pod in pods(parts)}
    for part in parts:
        if part["kind"] in ("Deployment", "StatefulSet"):
            found = [whose for whose, have in labels.items() if selects(part["spec"]["selector"], have)]
            assert found == [name(part)]
            assert not [key for key in part["spec"]["selector"]["matchLabels"] if "version" in key or "chart" in key]


@every_case
def test_services_lead_to_a_port_of_one_kind_of_pod(case: str) -> None:
    parts = rendered(case)
    for service in of_kind(parts, "Service"):
        [pod] = [
            pod
            for _, pod in pods(parts)
            if selects({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
        ]
        ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    names = {service["metadata"]["name"]: service for service in of_kind(parts, "Service")}
    for ingress in of_kind(parts, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"]["name"] in {p["name"] for p in names[backend["name"]]["spec"]["ports"]}


@every_case
def test_budgets_and_scalers_name_what_is_there(case: str) -> None:
    parts = rendered(case)
    names = {name(part) for part in parts}
    for budget in of_kind(parts, "PodDisruptionBudget"):
        found = [whose for whose, pod in pods(parts) if selects(budget["spec"]["selector"], pod["metadata"]["labels"])]
        assert found == [f"Deployment/{budget['metadata']['name']}"]
    for scaler in of_kind(parts, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert f"{target['kind']}/{target['name']}" in names
        [deployment] = [part for part in parts if name(part) == f"{target['kind']}/{target['name']}"]
        assert "replicas" not in deployment["spec"], "an upgrade would undo what the autoscaler did"


@every_case
def test_every_volume_is_declared_and_used(case: str) -> None:
    for whose, pod in pods(rendered(case)):
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        declared = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        if whose.startswith("StatefulSet"):
            [owner] = [part for part in rendered(case) if name(part) == whose]
            declared |= {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", [])}
        assert mounted == declared, whose
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), whose


@every_case
def test_every_secret_config_claim_and_account_is_there_or_named_by_a_value(case: str) -> None:
    parts = rendered(case)
    made = {name(part) for part in parts}
    values = yaml.safe_load(CASES[case].read_text())
    for whose, pod in pods(parts):
        for reference in _references(pod):
            kind, _, of = reference.partition("/")
            assert reference in made or of in _strings(values), f"{whose} needs {reference}, which nobody makes"


@every_case
def test_keys_of_secrets_that_the_chart_makes_are_in_them(case: str) -> None:
    parts = rendered(case)
    secrets = {part["metadata"]["name"]: part["stringData"].keys() for part in of_kind(parts, "Secret")}
    for _, pod in pods(parts):
        for container in containers(pod):
            for entry in container.get("env", []):
                reference = entry.get("valueFrom", {}).get("secretKeyRef")
                if reference and reference["name"] in secrets:
                    assert reference["key"] in secrets[reference["name"]]


def test_rules_and_dashboards_are_what_lies_in_their_directories(tmp_path: Path) -> None:
    chart = tmp_path / "stiefel"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("rules", "dashboards"))
    (chart / "rules").mkdir()
    (chart / "dashboards").mkdir()
    rules = [{"alert": "Tried", "expr": "up == 0", "annotations": {"summary": "{{ $labels.job }} is {{ $value }}"}}]
    (chart / "rules" / "one.yaml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": rules}]}))
    (chart / "rules" / "two.yaml").write_text(yaml.safe_dump({"groups": [{"name": "two", "rules": []}]}))
    dashboard = '{"title": "Tried", "legend": "{{job}}"}\n'
    (chart / "dashboards" / "tried.json").write_text(dashboard)
    done = template(CASES["external"], chart=chart)
    assert done.returncode == 0, done.stderr
    parts = objects(done.stdout)
    [rule] = of_kind(parts, "PrometheusRule")
    assert rule["spec"]["groups"] == [{"name": "one", "rules": rules}, {"name": "two", "rules": []}]
    [found] = [part for part in of_kind(parts, "ConfigMap") if "dashboard" in part["metadata"]["name"]]
    assert found["data"] == {"tried.json": dashboard}
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_alerts_link_to_where_the_repository_is_read(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("metrics: {prometheusRule: {enabled: true, runbookBase: 'https://git.example.com/stiefel/'}}")
    [rule] = of_kind(objects(template(CASES["external"], values).stdout), "PrometheusRule")
    alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"] if "alert" in alert]
    links = {alert["annotations"]["runbook_url"].partition("#")[0] for alert in alerts}
    assert links == {"https://git.example.com/stiefel/docs/alerts.md"}


@pytest.mark.parametrize("case", ["external", "bundled"])
def test_every_pod_of_ours_has_the_operator_s_volumes(case: str, tmp_path: Path) -> None:
    """A certificate of the database's, which PGSSLROOTCERT names, is needed by each."""
    values = tmp_path / "values.yaml"
    values.write_text("extraVolumes: [{name: ca, mountPath: /certificates, volume: {configMap: {name: ca}}}]")
    for whose, pod in pods(objects(template(CASES[case], values).stdout)):
        if "postgresql" not in whose and "valkey" not in whose:
            for container in containers(pod):
                assert "/certificates" in [mount["mountPath"] for mount in container["volumeMounts"]], whose


def test_monitors_find_the_services_and_call_the_jobs_as_rules_know_them() -> None:
    parts = rendered("external")
    jobs = {}
    for monitor in of_kind(parts, "ServiceMonitor"):
        [service] = [
            s for s in of_kind(parts, "Service") if selects(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        [relabeling] = endpoint["relabelings"]
        assert relabeling["targetLabel"] == "job"
        jobs[relabeling["replacement"]] = (component(service["spec"]["selector"]), endpoint["path"])
    assert jobs == {"stiefel-exporter": ("reaper", "/metrics"), "stiefel-api": ("api", "/metrics/api")}


def _references(pod: Object) -> set[str]:
    """Kind/name of all that a pod needs."""
    spec, found = pod["spec"], set()
    found |= {f"Secret/{secret['name']}" for secret in spec.get("imagePullSecrets", [])}
    if "serviceAccountName" in spec:
        found.add(f"ServiceAccount/{spec['serviceAccountName']}")
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            found.add(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
        if "configMap" in volume:
            found.add(f"ConfigMap/{volume['configMap']['name']}")
    for container in containers(pod):
        found |= {f"ConfigMap/{source['configMapRef']['name']}" for source in container.get("envFrom", [])}
        for entry in container.get("env", []):
            if "secretKeyRef" in entry.get("valueFrom", {}):
                found.add(f"Secret/{entry['valueFrom']['secretKeyRef']['name']}")
    return found


def _strings(value: object) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(_strings(item) for item in value.values()), set())
    if isinstance(value, list):
        return set().union(*(_strings(item) for item in value), set())
    return {str(value)}
