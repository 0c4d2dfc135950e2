"""docs/operations.md says nothing that compose, the chart or our own commands do not know."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.settings import Settings
from tests.deploy.chart import name, objects, template
from tests.deploy.commands import check_stiefel
from tests.deploy.compose import PROFILES, read
from tests.deploy.dockerfile import ROOT

GUIDE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "" for line in block.replace("\\\n", " ").splitlines()]
[VALUES] = [block for kind, block in BLOCKS if kind == "yaml"]


def test_the_example_of_values_renders_with_and_without_metrics(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(VALUES)
    done = template(values)
    assert done.returncode == 0, done.stderr
    assert {"Ingress/try-stiefel-api", "Deployment/try-stiefel-worker-h100"} <= set(map(name, objects(done.stdout)))

    [upgrade] = [line for line in COMMANDS if "serviceMonitor.enabled" in line]
    metrics: dict[str, dict[str, object]] = {}
    for path, value in re.findall(r"--set metrics\.([\w.]+)=(\S+)", upgrade):
        section, key = path.split(".")
        metrics.setdefault(section, {})[key] = yaml.safe_load(value)
    values.write_text(VALUES + yaml.safe_dump({"metrics": metrics}))
    done = template(values)
    assert done.returncode == 0, done.stderr
    assert sum(part["kind"] == "ServiceMonitor" for part in objects(done.stdout)) == 2


def test_secrets_of_the_example_are_made_before_they_are_named() -> None:
    made = set(re.findall(r"create secret generic (\S+)", "\n".join(COMMANDS)))
    named = set(re.findall(r"existingSecret: ([\w-]+)", VALUES)) | set(re.findall(r"apiKeySecret=(\S+)", GUIDE))
    assert named == made


def test_services_and_profiles_of_compose_are_there() -> None:
    services = set(read(*PROFILES)["services"])
    lines = [line for line in COMMANDS if "docker compose" in line]
    assert len(lines) > 10
    for line in lines:
        assert set(re.findall(r"--profile (\w+)", line)) <= set(PROFILES), line
        words = [word for word in line.partition("docker compose")[2].split() if not word.startswith("-")]
        words = [word for word in words if word not in PROFILES]
        verb, named = words[0], words[1:]
        # `run` and `exec` name one, and then what runs there; the others name as many as they like.
        named = named[:1] if verb in ("run", "exec") else list(itertools.takewhile(str.islower, named))
        named = [word for word in named if word not in ("SERVICE", "|", "grep", "&&")]
        assert set(named) <= services, line


@pytest.mark.parametrize("module", ["worker", "jobs.reaper", "migrations"])
def test_options_of_our_programs_are_there(module: str) -> None:
    options = set(re.findall(rf"python -m {re.escape(module)} (--[\w-]+)", GUIDE))
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(option in shown for option in options)


def test_commands_of_stiefel_are_there() -> None:
    # Behind a space or a backtick, up to the end of the line or of the inline code; not the name of a release.
    found = re.findall(r"(?:^|[ `])(stiefel (?:keys|workers|submit|logs) [^`|\n\\]+)", GUIDE, re.M)
    assert len(found) > 6
    for command in found:
        check_stiefel(command)


def test_settings_that_are_named_are_settings() -> None:
    known = {f"STIEFEL_{field.upper()}" for field in Settings.model_fields} | {"STIEFEL_API_KEY"}
    assert set(re.findall(r"\bSTIEFEL_[A-Z_]+[A-Z]\b", GUIDE)) <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)?(?:#[^)]*)?\)", GUIDE):
        assert not target or (ROOT / "docs" / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", GUIDE, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= headings
