"""The chart as the tests see it: rendered by a real Helm, once for each set of values, and read as objects."""

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import Unavailable, helm

CHART = Path(__file__).parents[2] / "helm" / "stiefel"
RELEASE, NAMESPACE = "try", "ml"
# Combinations of values that are rendered by most tests.
CASES = {file.name.removesuffix("-values.yaml"): file for file in sorted((CHART / "ci").glob("*-values.yaml"))}

Object = dict[str, Any]


def run_helm(major: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Skips the test where there is no such Helm."""
    try:
        program = helm(major)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def template(*values: Path, major: int = 4, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
    """`helm template` with files of values, the last of which counts most."""
    files = [argument for file in values for argument in ("--values", file)]
    return run_helm(major, "template", RELEASE, chart, "--namespace", NAMESPACE, *files)


@functools.cache
def text(case: str, major: int = 4) -> str:
    """What Helm makes of one of CASES."""
    done = template(CASES[case], major=major)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(case: str, major: int = 4) -> list[Object]:
    """Its objects. Each test has its own."""
    return objects(text(case, major))


def objects(manifest: str) -> list[Object]:
    parts: list[Object] = [part for part in yaml.load_all(manifest, Loader=_Strict) if part is not None]
    return parts


def of_kind(parts: list[Object], kind: str) -> list[Object]:
    return [part for part in parts if part["kind"] == kind]


def name(part: Object) -> str:
    return f"{part['kind']}/{part['metadata']['name']}"


def pods(parts: list[Object]) -> Iterator[tuple[str, Object]]:
    """(whose, template) of everything that makes pods."""
    for part in parts:
        if part["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name(part), part["spec"]["template"]
        elif part["kind"] == "ScaledJob":
            yield name(part), part["spec"]["jobTargetRef"]["template"]


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def component(labels: dict[str, str]) -> str:
    return labels["app.kubernetes.io/component"]


def environment(container: Object, parts: list[Object]) -> dict[str, Any]:
    """name → value, or where it comes from; ConfigMaps first, as Kubernetes has it."""
    maps = {part["metadata"]["name"]: part["data"] for part in of_kind(parts, "ConfigMap")}
    found: dict[str, Any] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]
    return found | {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", [])}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector finds labels."""
    exactly = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        exactly = exactly and labels.get(expression["key"]) in expression["values"]
    return exactly


class _Strict(yaml.CSafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: {twice} stands twice"
        return super().construct_mapping(node, deep)
