"""The Prometheus rules: promtool's own checks and cases, and that they name only what is really exported."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import promql
from tests.deploy.series import Series, exported

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "stiefel" / "rules"
CASES = Path(__file__).parent / "rules"
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def rules_of(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = {rule["record"]: rule for rule in rules_of("recording.yaml")}
ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yaml")}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """What exists: exported, or recorded from that."""
    return with_recorded(exported(tmp_path_factory.mktemp("exported")))


def with_recorded(series: Series) -> Series:
    """A rule may use those above it."""
    for name, rule in RECORDED.items():
        series.labels[name] = promql.labels_of(rule["expr"], series)
    return series


@needs_promtool
@pytest.mark.parametrize("file", ["recording.yaml", "alerts.yaml"])
def test_promtool_accepts_the_rules(file: str) -> None:
    promtool("check", "rules", str(RULES / file))


@needs_promtool
@pytest.mark.parametrize("file", sorted(CASES.glob("*.yaml")), ids=lambda file: file.stem)
def test_rules_do_in_each_case_what_they_are_for(file: Path) -> None:
    promtool("test", "rules", str(file))


def promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    fires, silent = set(), set()
    for file in CASES.glob("*.yaml"):
        for case in yaml.safe_load(file.read_text())["tests"]:
            for asked in case["promql_expr_test"]:
                # Of one alert that is asked for by name; of several, those that the answer names.
                named = re.findall(r'alertname="(\w+)"', asked["expr"])
                answers = asked.get("exp_samples", [])
                (fires if answers else silent).update(named)
                fires.update(name for answer in answers for name in re.findall(r'alertname="(\w+)"', str(answer)))
    assert ALERTS.keys() - fires == set()
    assert ALERTS.keys() - silent == set()
    assert (fires | silent) - ALERTS.keys() == set()


def test_every_rule_names_only_series_and_labels_that_exist(series: Series) -> None:
    for rule in ALERTS.values():
        promql.labels_of(rule["expr"], series)


def test_every_alert_says_who_is_to_look_and_what_to_read(series: Series) -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        told = rule["annotations"]
        assert told.keys() == {"summary", "description", "runbook_url"}
        assert told["runbook_url"] == f"docs/alerts.md#{name.lower()}"
        named = set(re.findall(r"\$labels\.(\w+)", "".join(told.values())))
        assert named <= promql.labels_of(rule["expr"], series).keys(), f"{name} tells of labels that it has not"


def test_every_alert_and_no_other_has_its_heading_in_the_documentation() -> None:
    headings = re.findall(r"^## (Stiefel\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert headings == list(ALERTS)


def test_recorded_names_say_level_metric_and_operation() -> None:
    for name in RECORDED:
        level, metric, operation = name.split(":")
        assert level in ("fleet", "state", "reason", "device", "method", "route", "le")
        assert metric.startswith("stiefel_")
        assert operation


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("stiefel_job_train_losses", "does not exist"),
        ('stiefel_jobs{status="queued"}', "no label status"),
        ('stiefel_jobs{state="waiting"}', "no state is like waiting"),
        ('rate(stiefel_attempt_failures_total{reason=~"oom.*"}[5m])', "no reason is like"),
        ("sum by (worker) (stiefel_queue_depth)", "no label worker"),
        ("histogram_quantile(0.9, rate(stiefel_queue_wait_seconds_sum[5m]))", "no label le"),
        ("sum(stiefel_jobs) without (state) > stiefel_queue_depth", "never matches"),
        ("stiefel_job_step and on (worker) stiefel_job_info", "no label worker"),
    ],
)
def test_an_expression_that_names_what_does_not_exist_is_found(series: Series, expression: str, why: str) -> None:
    with pytest.raises(promql.Problem, match=why):
        promql.labels_of(expression, series)
