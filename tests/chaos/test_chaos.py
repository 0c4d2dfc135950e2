"""One short campaign, and two longer ones among the slow tests; `make chaos` has the long ones."""

from pathlib import Path

import pytest

from tests.chaos.campaign import Result, carry_out
from tests.chaos.plan import Databases, make_plan
from tests.chaos.report import as_markdown
from tests.chaos.specs import undisturbed


def campaign(home: Path, seed: int, seconds: float, database: Databases, jobs: int | None = None) -> Result:
    names = ("galore-two-ranks", "galore", "golore")
    plan = make_plan(seed, seconds, database, names, pause=(0.5, 2.5), jobs=jobs)
    curves = undisturbed(plan.specs, home / "quiet", home / "cache")
    result = carry_out(plan, home / "home", curves, print)
    print(as_markdown([result]))
    return result


def test_under_a_dozen_faults_every_promise_is_kept(tmp_path: Path) -> None:
    result = campaign(tmp_path, seed=12, seconds=25, database="sqlite", jobs=3)
    assert result.broken == []
    assert len(+result.struck) >= 8
    assert result.plan.specs[0] == "galore-two-ranks"
    assert result.trainers_seen > 100


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_under_all_kinds_of_faults_every_promise_is_kept(tmp_path: Path, database: Databases) -> None:
    result = campaign(tmp_path, seed=2, seconds=120, database=database)
    assert result.broken == []
    assert len(+result.struck) >= 18
