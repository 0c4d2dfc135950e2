"""docs/performance.md from benchmarks/results: the text between two marks is a measurement's, all else is written by
hand."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.catalogue import MEASUREMENTS, Measurement

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "figures" / "performance"

# Measurements whose rows are steps beside each other.
_DRAWN = {
    "one-rank": "one rank",
    "factors": "one rank, factors",
    "two-ranks-fp32": "two ranks, fp32",
    "two-ranks-bf16": "two ranks, bf16",
}


def result_of(measurement: Measurement) -> dict[str, Any] | None:
    """What was measured last; None where nothing has been."""
    file = RESULTS / f"{measurement.name}.json"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def filled(page: str) -> str:
    """The page with the newest figures. Raises ValueError where a measurement has no place in it."""
    for measurement in MEASUREMENTS:
        begin, end = f"<!-- measured: {measurement.name} -->", f"<!-- end: {measurement.name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n{section(measurement)}\n{end}"
        page, times = place.subn(lambda _, text=text: text, page)
        if times != 1:
            raise ValueError(f"{PAGE.name} has {times} places between {begin} and {end}; it needs one")
    return page


def section(measurement: Measurement) -> str:
    result = result_of(measurement)
    if result is None:
        why = f"{measurement.lacks}. " if measurement.lacks else ""
        return f"**Not measured yet.** {why}`{measurement.command}`"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "stiefel")
    return "\n".join(
        [
            f"`{result['command']}` on {result['machine']}; {versions}; revision {result['revision']}",
            "",
            measurement.markdown(result),
        ]
    )


def draw() -> list[Path]:
    """Each variant's mean time of a step, switches included, as a share of full training's: PICTURE.png and .svg."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "stiefel"  # the same file for the same figures
    found = {title: result["rows"] for m in MEASUREMENTS if (title := _DRAWN.get(m.name)) and (result := result_of(m))}
    if not found:
        return []
    heights = [len(rows) for rows in found.values()]
    longest = max(row["mean_ratio"] for rows in found.values() for row in rows)
    figure, axes = pyplot.subplots(
        len(found), 1, figsize=(8, 1.2 + 0.4 * sum(heights)), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, rows) in zip(axes[:, 0], found.items(), strict=True):
        names, ratios = [row["variant"] for row in rows], [row["mean_ratio"] for row in rows]
        colours = ["tab:orange" if name.startswith("package:") else "tab:blue" for name in names]
        axis.bar_label(axis.barh(names, ratios, color=colours), fmt="%.2f", padding=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1, 0].set(xlabel="time of a step, of full-rank AdamW's (orange: other packages)", xlim=(0, 1.1 * longest))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    paths = [PICTURE.with_suffix(".png"), PICTURE.with_suffix(".svg")]
    pyplot.savefig(paths[0], dpi=150)
    pyplot.savefig(paths[1], metadata={"Date": None})
    return paths
