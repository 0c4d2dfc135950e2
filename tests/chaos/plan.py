"""What will happen when. A pure function of the seed: nothing here looks at a clock or at a process."""

import random
from dataclasses import dataclass
from typing import Literal

Databases = Literal["sqlite", "postgresql"]


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `shortest` and `longest`: seconds until it is undone."""

    name: str
    group: str
    shortest: float
    longest: float
    database: Databases | None = None  # where it exists on one alone


# Longer than a lease of the stack under test, and shorter.
LEASE = 4.0
_LONG = (1.25 * LEASE, 2 * LEASE)
_SHORT = (0.2, 0.4 * LEASE)

KINDS = {
    kind.name: kind
    for kind in (
        Kind("api_killed", "api", *_SHORT),
        Kind("reaper_killed", "reaper", *_SHORT),
        Kind("reaper_stopped", "reaper", *_LONG),
        Kind("worker_main_killed", "worker", *_SHORT),
        Kind("worker_child_killed", "worker", 0.0, 0.0),
        Kind("worker_killed", "worker", *_LONG),
        Kind("worker_told_to_end", "worker", *_SHORT),
        Kind("worker_stopped_briefly", "worker", *_SHORT),
        Kind("worker_stopped_for_long", "worker", *_LONG),
        Kind("worker_and_trainer_stopped_for_long", "worker", *_LONG),
        Kind("trainer_killed", "trainer", 0.0, 0.0),
        Kind("trainer_stopped_briefly", "trainer", *_SHORT),
        Kind("trainer_stopped_for_long", "trainer", *_LONG),
        Kind("rank_killed", "rank", 0.0, 0.0),
        Kind("rank_stopped", "rank", *_SHORT),
        Kind("torchrun_killed", "rank", 0.0, 0.0),
        Kind("launcher_killed", "rank", 0.0, 0.0),
        Kind("broker_killed", "broker", *_SHORT),
        Kind("broker_emptied", "broker", *_SHORT),
        Kind("broker_stopped", "broker", *_LONG),
        Kind("database_locked", "database", 0.5, 1.5 * LEASE, "sqlite"),
        Kind("database_killed", "database", *_SHORT, "postgresql"),
        Kind("database_killed_for_long", "database", *_LONG, "postgresql"),
        Kind("database_connections_cut", "database", 0.0, 0.0, "postgresql"),
        Kind("power_cut", "machine", 0.5, 3.0),
        Kind("paused_and_resumed", "user", 0.1, 6.0),
        Kind("cancelled", "user", 0.1, 10.0),
        Kind("submitted_in_an_outage", "user", *_SHORT),
    )
}
GROUPS = tuple(dict.fromkeys(kind.group for kind in KINDS.values()))


@dataclass(frozen=True)
class Fault:
    """`pick`, from 0 to 1, chooses among what can be hit when its time has come."""

    at: float
    kind: str
    pick: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """`specs` are submitted in this order, the first at once and the next whenever too few are unfinished."""

    seed: int
    seconds: float
    database: Databases
    specs: tuple[str, ...]
    faults: tuple[Fault, ...]


def kinds_of(groups: tuple[str, ...], database: Databases) -> list[Kind]:
    """Raises ValueError for a word that is no group."""
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"no such faults: {', '.join(unknown)}; there are: {', '.join(GROUPS)}")
    return [kind for kind in KINDS.values() if kind.group in groups and kind.database in (None, database)]


def make_plan(
    seed: int,
    seconds: float,
    database: Databases,
    names: tuple[str, ...],
    groups: tuple[str, ...] = GROUPS,
    pause: tuple[float, float] = (0.5, 4.0),
    jobs: int | None = None,
) -> Plan:
    """`names`: the specifications to choose from; `pause`: the shortest and longest seconds between two faults.

    Kinds are dealt like cards, so that all come up before one comes twice.
    """
    chance = random.Random(f"{seed} {database}")
    kinds = kinds_of(groups, database)
    faults: list[Fault] = []
    deck: list[Kind] = []
    # Workers have something to do before the first.
    at = 4.0
    while at < seconds:
        if not deck:
            deck = chance.sample(kinds, len(kinds))
        kind = deck.pop()
        faults.append(Fault(round(at, 2), kind.name, chance.random(), round(_between(chance, kind), 2)))
        at += chance.uniform(*pause)
    # Enough that there is always one to submit, also on a fast machine.
    count = jobs or max(3, round(seconds / 5))
    cards: list[str] = []
    # Of their own: what is trained shall not depend on how long it is disturbed.
    chance = random.Random(f"{seed} specs")
    while len(cards) < count:
        cards += chance.sample(names, len(names))
    return Plan(seed, seconds, database, tuple(cards[:count]), tuple(faults))


def _between(chance: random.Random, kind: Kind) -> float:
    return chance.uniform(kind.shortest, kind.longest)
