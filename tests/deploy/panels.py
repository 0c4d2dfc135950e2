"""The dashboards as files, and the queries in them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[2] / "helm" / "stiefel" / "dashboards"
FILES = sorted(DIRECTORY.glob("*.json"))
# What Grafana puts in the place of a variable, where everything is chosen.
_CHOSEN = {"$__rate_interval": "5m", "$method": ".*", "$job": ".*"}


def dashboard(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something; a row is a heading."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(title of the panel, target, expression as Prometheus gets it)"""
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel["title"], target, chosen(target["expr"])


def chosen(expression: str) -> str:
    for variable, value in _CHOSEN.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, f"{expression}: a variable that no dashboard has"
    return expression


def of_variables(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(selector, label) of each variable that is filled by label_values."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None, variable
            yield chosen(found[1]), found[2]
