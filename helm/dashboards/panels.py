"""What a panel and a dashboard are to Grafana: plain dictionaries, laid out from left to right, row by row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

WIDTH = 24
HEIGHT = 8
# Those of Grafana 11; later versions bring older dashboards up to date as they load them.
SCHEMA_VERSION = 39
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """`queries`: legend → expression. `steps`: colours, each from a value on; the first is the one below."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str
    kind: str = "timeseries"
    width: int = 8
    height: int = HEIGHT
    steps: Sequence[tuple[str, float | None]] = (("green", None),)
    low: float | None = None
    high: float | None = None
    stacked: bool = False
    logarithmic: bool = False
    instant: bool = False
    hidden: tuple[str, ...] = ()  # columns of a table


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """Chosen at the top of the dashboard: values of a label."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = field(default=())

    def as_json(self) -> Json:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["stiefel"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "timezone": "browser",
            "links": [_LINK],
            "templating": {"list": [_datasource(), *map(_variable, self.variables)]},
            "annotations": {"list": []},
            "panels": list(_laid_out(self.rows)),
        }


_LINK = {
    "title": "Stiefel",
    "type": "dashboards",
    "tags": ["stiefel"],
    "icon": "external link",
    "tooltip": "",
    "asDropdown": False,
    "targetBlank": False,
    "includeVars": False,
    "keepTime": True,
}


def _laid_out(rows: Iterable[Row]) -> Iterable[Json]:
    number, y = 0, 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": panel.height})
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel, number: int, place: dict[str, int]) -> Json:
    defaults: Json = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"color": c, "value": at} for c, at in panel.steps]},
    }
    defaults |= {key: value for key, value in (("min", panel.low), ("max", panel.high)) if value is not None}
    transformations = []
    if panel.kind == "timeseries":
        defaults["custom"] = _lines(panel)
    if panel.hidden:
        hide = {"excludeByName": dict.fromkeys(panel.hidden, True), "indexByName": {}, "renameByName": {}}
        transformations = [{"id": "organize", "options": hide}]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(panel, chr(ord("A") + n), *query) for n, query in enumerate(panel.queries.items())],
        "transformations": transformations,
    }


def _lines(panel: Panel) -> Json:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 20 if panel.stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
        # A line where the colours change, where they do.
        "thresholdsStyle": {"mode": "dashed" if len(panel.steps) > 1 else "off"},
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "bargauge": {"reduceOptions": _LAST, "displayMode": "basic", "orientation": "horizontal", "showUnfilled": True},
    "table": {"showHeader": True, "cellHeight": "sm"},
}


def _target(panel: Panel, letter: str, legend: str, expression: str) -> Json:
    return {
        "refId": letter,
        "datasource": _DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": legend,
        "instant": panel.instant,
        "range": not panel.instant,
        "format": "table" if panel.kind == "table" else "time_series",
    }


def _datasource() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(variable: Variable) -> Json:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "refresh": 2,
        "sort": 1,
        "hide": 0,
    }
