"""The chart's values: each has a comment and a schema, and those that are settings are the programs' own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import Settings
from tests.deploy.chart import CASES, CHART, run_helm, template

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Kubernetes' own structures, which its own schemas are for.
FREE = {"affinity", "volume", "valueFrom", "global"}
# What the chart works out by itself. Without API keys the API would answer its own pod alone.
WORKED_OUT = {"home", "database_url", "redis_url", "gpus", "cpu_slots", "worker", "alive_file", "auth"}
WORKED_OUT |= {"generator_url", "generator_secret"}

REFUSED = {
    "bogus: 1": ["bogus"],
    "api: {replica: 3}": ["api", "replica"],
    "api: {ingress: {tls: {secret: x}}}": ["tls", "secret"],
    "settings: {graceSecond: 5}": ["settings", "graceSecond"],
    "workers: [{name: a, gpu: 2}]": ["workers", "gpu"],
    "workers: [{gpus: 2}]": ["workers", "name"],
    "workers: [{name: Gross}]": ["workers", "name"],
    "workers: {name: a}": ["workers"],
    "workerDefaults: {scaling: scaledobject}": ["workerDefaults", "scaling"],
    "workers: [{name: a, resources: {limits: {cpu: 1, memory: 1Gi}}}]": ["resources", "requests"],
    "workers: [{name: a, resources: {limits: {cpu: 1}, requests: {cpu: 1, memory: 1Gi}}}]": ["limits", "memory"],
    "api: {resources: null}": ["api", "resources"],
    "workerDefaults: {shmSize: 8 GB}": ["shmSize"],
    "api: {replicas: two}": ["replicas"],
    "settings: {leaseSeconds: 0}": ["leaseSeconds"],
    "settings: {readable: /data}": ["readable"],
    "settings: {readable: ['/a:/b']}": ["readable"],
    "database: {sslmode: maybe}": ["sslmode"],
    "database: {host: 'db/x'}": ["host"],
    "broker: {password: 'a@b'}": ["broker", "password"],
    "image: {api: {digest: latest}}": ["digest"],
    "extraEnv: [{name: STIEFEL_HOME, value: /}]": ["extraEnv"],
    "extraEnv: [{name: A}]": ["extraEnv"],
    "extraVolumes: [{name: a, mountPath: data, volume: {emptyDir: {}}}]": ["mountPath"],
    "runs: {accessModes: [ReadOnlyMany]}": ["accessModes"],
    "generator: {gpus: 2}": ["generator", "gpus"],
    "generator: {replicas: 2}": ["generator", "replicas"],
}
CONTRADICTORY = {
    "database: {host: ''}": "database.host",
    "database: {existingSecret: ''}": "database.existingSecret",
    "database: {password: x}": "database.password",
    "database: {existingSecret: '', urlKey: url}": "database.existingSecret",
    "postgresql: {enabled: true}": "database.host, database.urlKey",
    "broker: {host: ''}": "broker.host",
    "broker: {password: x}": "broker.password",
    "broker: {existingSecret: '', urlKey: url}": "broker.existingSecret",
    "valkey: {enabled: true}": "broker.host, broker.urlKey, broker.tls",
    "{valkey: {enabled: true}, broker: {host: '', existingSecret: ''}}": "broker.existingSecret",
    "api: {ingress: {enabled: true}}": "api.ingress.host",
    "api: {ingress: {enabled: true, host: x.example.com}}": "api.ingress.tls.secretName",
    "api: {autoscaling: {enabled: true, minReplicas: 9}}": "api.autoscaling.minReplicas",
    "metrics: {serviceMonitor: {enabled: true}}": "metrics.serviceMonitor.apiKeySecret",
    "runs: {type: emptyDir}": "settings.writable",
    "generator: {enabled: true}": "generator.existingSecret",
    "{generator: {enabled: true, existingSecret: s}, runs: {type: emptyDir}, settings: {writable: ['s3://b']}}": (
        "generator.enabled"
    ),
    "{runs: {type: emptyDir, existingClaim: x}, settings: {writable: ['s3://b']}}": "runs.existingClaim",
    "extraVolumes: [{name: runs, mountPath: /a, volume: {emptyDir: {}}}]": "extraVolumes",
    "extraVolumes: [{name: a, mountPath: /tmp, volume: {emptyDir: {}}}]": "extraVolumes",
    "workers: [{name: a}, {name: a}]": "workers",
    "workers: [{name: a, terminationGracePeriodSeconds: 149}]": "workers[a].terminationGracePeriodSeconds",
    "settings: {graceSeconds: 150.5}": "workers[l4].terminationGracePeriodSeconds",
    "settings: {leaseSeconds: 20}": "settings.leaseSeconds",
    "workers: [{name: a, scaling: keda, replicas: 2}]": "workers[a].replicas",
    "workers: [{name: a, maxReplicas: 2}]": "workers[a].maxReplicas",
    "workers: [{name: a, cpuSlots: 2}]": "workers[a].cpuSlots",
    "{database: {host: '', urlKey: url}, workers: [{name: a, scaling: keda}]}": "keda.existingSecret",
    "{extraEnv: [{name: A, value: b}], workers: [{name: a, env: [{name: A, value: c}]}]}": "workers[a].env",
    "workers: [{name: a, resources: {limits: &r {cpu: 1, memory: 1, nvidia.com/gpu: 1}, requests: *r}}]": (
        "workers[a].resources.limits"
    ),
}


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("values", REFUSED)
def test_what_the_schema_does_not_know_is_refused_by_name(values: str, major: int, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(values)
    done = template(CASES["keda"], file, major=major)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert not [word for word in REFUSED[values] if word not in done.stderr], done.stderr


@pytest.mark.parametrize("values", CONTRADICTORY)
def test_values_that_contradict_each_other_are_refused_by_name(values: str, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(values)
    done = template(CASES["keda"], file)
    assert done.returncode != 0
    assert f": {CONTRADICTORY[values]}: " in done.stderr


def test_the_chart_as_it_comes_says_what_it_needs() -> None:
    done = template()
    assert done.returncode != 0
    assert ": database.host: say where PostgreSQL is" in done.stderr


def test_helm_has_nothing_to_complain_of_in_the_chart_as_it_comes() -> None:
    done = run_helm(4, "lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_object_of_the_schema_refuses_unknown_keys() -> None:
    for path, part in _objects(SCHEMA, ()):
        if path and path[-1] not in FREE and part.get("maxProperties") != 0 and path != ("objects", "items"):
            assert part.get("additionalProperties", True) is not True, "/".join(path)


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    without_default = {("api", "settings", "largestJob"), ("global",)}
    schema = set(_keys(SCHEMA)) - without_default
    values = set(_leaves(VALUES))
    assert {key for key in schema if key not in values and not _free(key)} == set()
    assert {key for key in values if key not in schema and not _free(key)} == set()


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        key = re.match(r"( *)(?:- )?(\w+):(.*)", line)
        if key and key[3].strip() and key[2] not in ("requests", "limits", "name"):
            assert before.strip().startswith("#"), line


def test_settings_are_those_of_the_programs_with_their_defaults() -> None:
    chart = VALUES["settings"] | VALUES["api"]["settings"]
    chart |= {"readable": ":".join(chart["readable"]), "writable": " ".join(chart["writable"])}
    given = {_snake(key): value for key, value in chart.items()}
    known = (
        SCHEMA["properties"]["settings"]["properties"]
        | SCHEMA["properties"]["api"]["properties"]["settings"]["properties"]
    )
    fields = Settings.model_fields
    assert {_snake(key) for key in known} == fields.keys() - WORKED_OUT
    defaults = {name: fields[name].default for name in given}
    # Logs of a cluster are read by programs, and its pods call nobody unless it is said.
    assert given | {"log_format": defaults["log_format"], "webhooks": defaults["webhooks"]} == defaults


def _snake(camel: str) -> str:
    return re.sub(r"(?<=[a-z])[A-Z]", lambda letter: "_" + letter[0], camel).lower()


def _objects(part: Any, path: tuple[str, ...]) -> Any:
    """(path, schema) of everything that is an object."""
    if isinstance(part, dict):
        if part.get("type") == "object":
            yield path, part
        for key, value in part.items():
            if key in ("properties", "definitions"):
                for each, inner in value.items():
                    yield from _objects(inner, (*path, each))
            elif key in ("items", "anyOf"):
                yield from _objects(value, (*path, key))
    elif isinstance(part, list):
        for item in part:
            yield from _objects(item, path)


def _resolved(part: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in part:
        return _resolved(SCHEMA["definitions"][part["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in part:
        return _resolved(part["anyOf"][0])
    return part


def _keys(part: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    for key, inner in part.get("properties", {}).items():
        inner = _resolved(inner)
        if "properties" in inner:
            yield from _keys(inner, (*path, key))
        else:
            yield (*path, key)


def _leaves(part: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    for key, inner in part.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key)


def _free(key: tuple[str, ...]) -> bool:
    """Below something of Kubernetes' own, or a key that only a pool's image has."""
    return bool({"requests", "limits", "labels"} & set(key)) or key[:2] in (
        ("workerDefaults", "image"),
        ("generator", "image"),
    )
