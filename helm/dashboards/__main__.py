"""python -m helm.dashboards: write the dashboards where the chart and compose look for them."""

import json
from pathlib import Path

from helm.dashboards.fleet import FLEET
from helm.dashboards.training import TRAINING

DIRECTORY = Path(__file__).parents[1] / "stiefel" / "dashboards"
DASHBOARDS = {"training.json": TRAINING, "fleet.json": FLEET}


def text(name: str) -> str:
    return json.dumps(DASHBOARDS[name].as_json(), indent=2) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (DIRECTORY / name).write_text(text(name))
