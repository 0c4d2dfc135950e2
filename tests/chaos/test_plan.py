"""A plan is a pure function of its seed, and a fair one."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.plan import GROUPS, KINDS, LEASE, Databases, Plan, kinds_of, make_plan
from tests.chaos.specs import SPECS, TWO_RANKS


def plan(seed: int = 7, seconds: float = 600, database: Databases = "sqlite", **options: Any) -> Plan:
    return make_plan(seed, seconds, database, tuple(SPECS), **options)


def test_one_seed_is_one_plan_and_another_is_another() -> None:
    assert plan() == plan()
    assert plan(8).faults != plan().faults
    assert plan(database="postgresql").faults != plan().faults


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("seed", range(5))
def test_every_kind_comes_before_one_comes_twice(seed: int, database: Databases) -> None:
    kinds = [kind.name for kind in kinds_of(GROUPS, database)]
    dealt = [fault.kind for fault in plan(seed, 600, database).faults]
    assert len(dealt) > 2 * len(kinds)
    assert sorted(dealt[: len(kinds)]) == sorted(kinds)
    assert max(Counter(dealt).values()) - min(Counter(dealt).values()) <= 1


def test_faults_come_in_order_within_their_time_and_last_as_long_as_their_kind_may() -> None:
    faults = plan().faults
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert faults[-1].at < 600
    for fault in faults:
        assert 0 <= fault.pick < 1
        kind = KINDS[fault.kind]
        assert kind.shortest - 0.01 <= fault.seconds <= kind.longest + 0.01
    longest = {fault.kind for fault in faults if fault.seconds > LEASE}
    assert "worker_stopped_for_long" in longest
    assert "worker_stopped_briefly" not in longest


def test_a_plan_of_some_faults_has_no_others() -> None:
    found = {KINDS[fault.kind].group for fault in plan(groups=("worker", "broker")).faults}
    assert found == {"worker", "broker"}
    with pytest.raises(ValueError, match="no such faults: tornado; there are: api"):
        plan(groups=("tornado",))


def test_jobs_of_two_ranks_are_among_the_first() -> None:
    """Every specification is submitted before one is submitted twice."""
    for seed in range(20):
        specs = plan(seed).specs
        assert set(specs[: len(SPECS)]) == set(SPECS)
        assert set(TWO_RANKS) <= set(specs)
    assert len(plan(jobs=3).specs) == 3
    assert replace(plan(jobs=3), specs=()) == replace(plan(), specs=())
