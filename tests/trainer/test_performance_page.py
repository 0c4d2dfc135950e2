"""docs/performance.md says what benchmarks/results hold, and every measurement can be made and shown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.catalogue import MEASUREMENTS, Measurement
from benchmarks.report import PAGE, filled, result_of, section

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_was_measured() -> None:
    assert filled(PAGE.read_text()) == PAGE.read_text(), "python -m benchmarks report"


def test_a_page_without_a_place_for_a_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 0 places between <!-- measured: one-rank -->"):
        filled("# Performance\n")


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda m: m.name)
def test_results_name_their_machine_and_the_command_that_is_listed(measurement: Measurement) -> None:
    result = result_of(measurement)
    if result is None:
        assert "Not measured yet" in section(measurement) and measurement.command in section(measurement)
        return
    assert {"machine", "date", "versions", "revision", "arguments"} <= result.keys()
    assert result["command"] == f"{measurement.command} --json"
    assert result["revision"] and not result["revision"].endswith("-dirty"), "measure what is committed"
    assert "\n| " in measurement.markdown(result)


def test_what_is_not_measured_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert filled(PAGE.read_text()).count("**Not measured yet.**") == len(MEASUREMENTS)


def test_a_new_result_reaches_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {
        "variant": "full",
        "step_seconds": 2.0,
        "ratio": 1.0,
        "switched": False,
        "switch_seconds": 0.0,
        "mean_ratio": 1.0,
    }
    rows = [row | {"tokens_per_second": 512.0, "switch_share": 0.0}]
    about: dict[str, Any] = {
        "machine": "an abacus",
        "versions": {"torch": "9.9"},
        "revision": "abc",
        "command": "beads",
    }
    (tmp_path / "one-rank.json").write_text(json.dumps(about | {"rows": rows}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = filled(PAGE.read_text())
    assert "`beads` on an abacus; torch 9.9; revision abc" in page
    assert "| full | 2000 ms | 1.000 | – | – | – | 512 |" in page


def test_the_list_names_every_benchmark_and_measurement() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = json.loads(done.stdout)
    assert {"steps", "gpu", "peak", "ingest", "pretrain"} <= shown["benchmarks"].keys()
    assert [one["name"] for one in shown["measurements"]] == [m.name for m in MEASUREMENTS]
