"""The Grafana dashboards: what their panels name exists, and Grafana's own schema knows every field of them.

Whether each query answers is asked of a real Prometheus in tests/system/test_prometheus.py.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards.__main__ import DASHBOARDS, text
from tests.deploy import promql
from tests.deploy.panels import FILES, chosen, dashboard, of_variables, panels, queries
from tests.deploy.series import Series, exported
from tests.deploy.test_rules import with_recorded

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return with_recorded(exported(tmp_path_factory.mktemp("exported")))


def test_the_files_are_what_the_tables_say() -> None:
    assert {file.name for file in FILES} == DASHBOARDS.keys()
    for file in FILES:
        assert file.read_text() == text(file.name), f"python -m helm.dashboards writes {file.name} anew"


@each
def test_every_query_names_only_series_and_labels_that_exist(file: Path, series: Series) -> None:
    for _, target, expression in queries(dashboard(file)):
        labels = promql.labels_of(expression, series)
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= labels.keys(), f"{target['legendFormat']}: the legend of {expression} has only {sorted(labels)}"


@each
def test_every_variable_is_filled_from_a_label_that_exists(file: Path, series: Series) -> None:
    board = dashboard(file)
    for selector, label in of_variables(board):
        assert label in promql.labels_of(selector, series)
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == names, "a variable that is not used, or not there"


def test_a_panel_that_names_a_missing_metric_is_found(series: Series) -> None:
    """A check of the check: each of these is a query of a dashboard, with one word changed."""
    whole = chosen('max by (method, job_id) (stiefel_job_train_loss{method=~"$method", job_id=~"$job"})')
    promql.labels_of(whole, series)
    for right, wrong in (("train_loss", "training_loss"), ("job_id=~", "job=~"), ("by (method", "by (model")):
        broken = whole.replace(right, wrong).replace('job=~".*"', 'job_name=~".*"')
        with pytest.raises(promql.Problem):
            promql.labels_of(broken, series)


@each
def test_every_panel_says_what_it_shows_and_in_what_unit(file: Path) -> None:
    for panel in panels(dashboard(file)):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        several = len(panel["targets"]) > 1
        assert all(target["legendFormat"] for target in panel["targets"]) or not several


@each
def test_ids_are_unique_and_panels_do_not_overlap(file: Path) -> None:
    board = dashboard(file)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    cells: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in cells, f"{panel['title']} lies on {cells[cell]}"
            cells[cell] = panel["title"]


def test_dashboards_have_names_of_their_own() -> None:
    boards = [dashboard(file) for file in FILES]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards)


@each
def test_grafana_knows_every_field(file: Path) -> None:
    """Read and written by Grafana's own model of a dashboard, which drops what it does not know."""
    board = dashboard(file)
    assert lost(board, through_the_model(board)) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    board = dashboard(FILES[0])
    board["panels"][1]["tittle"] = "misspelt"
    assert lost(board, through_the_model(board)) == ["/panels/1/tittle"]


def through_the_model(board: dict[str, Any]) -> Any:
    register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))


def lost(before: Any, after: Any, where: str = "") -> list[str]:
    """What is in `before` and not, or otherwise, in `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            found
            for key, value in before.items()
            for found in (lost(value, after[key], f"{where}/{key}") if key in after else [f"{where}/{key}"])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        return [found for index, pair in enumerate(pairs) for found in lost(*pair, f"{where}/{index}")]
    return [] if before == after else [where]
