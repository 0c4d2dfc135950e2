"""One campaign: a stack, a plan carried out on it, a bounded wait for the end, and what was seen."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli.stack import Stack
from tests.chaos import check
from tests.chaos.check import TERMINAL, Broken, Seen
from tests.chaos.faults import strike
from tests.chaos.plan import KINDS, LEASE, Plan
from tests.chaos.specs import SPECS, Curve
from tests.chaos.world import World, end
from tests.system.postgresql import Postgresql
from tests.system.service import QUICK
from tests.system.watch import Watch

# So many jobs are unfinished at a time, as long as the plan has some.
_AT_ONCE = 3
# A fault that finds nothing of its kind comes back after so many seconds: the rank that it needs may start soon.
_AGAIN = 1.5
# For the end: from the last fault on, and for each job that is unfinished then.
_PATIENCE, _PATIENCE_PER_JOB = 120.0, 90.0

_SETTINGS = QUICK | {
    "STIEFEL_LEASE_SECONDS": str(LEASE),
    # It is the number of attempts that gives up, and here each is ended by a fault.
    "STIEFEL_MAX_ATTEMPTS": "1000000",
    "STIEFEL_MAX_LOSSES": "1000000",
    "STIEFEL_BACKOFF_SECONDS": "0.001",
}


@dataclass
class Result:
    plan: Plan
    home: Path
    struck: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)  # nothing of the kind was there
    jobs: list[Seen] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # what was printed
    looks: int = 0
    trainers_seen: int = 0  # by how many of the looks
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        return not self.broken


def carry_out(plan: Plan, home: Path, curves: dict[str, Curve], say: Callable[[str], None]) -> Result:
    result = Result(plan, home)
    with ExitStack() as resources:
        server = resources.enter_context(Postgresql()) if plan.database == "postgresql" else None
        environment = _SETTINGS | ({"STIEFEL_DATABASE_URL": server.url} if server else {})
        stack = Stack(home, port=0, workers=2, environment=environment)
        resources.enter_context(stack)
        watch = resources.enter_context(Watch(home / "runs"))

        def tell(line: str) -> None:
            result.lines.append(f"{world.now:7.1f} s  {line}")
            say(result.lines[-1])

        world = World(stack, server, tell, tuple(dict.fromkeys(plan.specs)))
        resources.callback(world.close)
        _disturb(world, plan, result)
        ended = _wait_for_the_end(world)
        if ended:
            result.jobs = check.gather(world)
        else:
            result.broken.append(Broken("every accepted job ends", "the service", f"unfinished: {_unfinished(world)}"))
        left = [f"process {process.pid}" for process in end(world)]
        result.broken += check.broken(
            result.jobs, world.accepted if ended else (), world.cancelled, curves, watch.overlaps, left
        )
        result.looks, result.trainers_seen, result.seconds = watch.looks, watch.busy, world.now
    return result


def _disturb(world: World, plan: Plan, result: Result) -> None:
    specs, faults = list(plan.specs), list(plan.faults)
    next_look = 0.0
    while faults or world.now < plan.seconds:
        world.tend()
        if specs and world.now >= next_look:
            _feed(world, specs)
            next_look = world.now + 1.0
        if faults and world.now >= faults[0].at:
            fault = faults.pop(0)
            if hit := strike(world, fault):
                result.struck[fault.kind] += 1
                world.say(f"{fault.kind}: {hit}")
            elif world.now + _AGAIN < plan.seconds:
                faults = sorted([replace(fault, at=world.now + _AGAIN), *faults], key=lambda fault: fault.at)
            else:
                result.missed[fault.kind] += 1
        time.sleep(0.05)


def _feed(world: World, specs: list[str]) -> None:
    """Submit until so many are unfinished; a refusal, or no answer, is tried again later."""
    jobs = world.jobs()
    if jobs is None:
        return
    unfinished = sum(job["state"] not in TERMINAL for job in jobs)
    while specs and unfinished < _AT_ONCE:
        job_id = world.submit(specs[0], SPECS[specs[0]])
        if job_id is None:
            return
        world.say(f"submitted {job_id}, {specs.pop(0)}")
        unfinished += 1


def _wait_for_the_end(world: World) -> bool:
    """No more faults; what is down comes back. False if some job has not ended in time."""
    world.say("no more faults")
    deadline = world.now + _PATIENCE + _PATIENCE_PER_JOB * (len(_unfinished(world)) or len(world.accepted))
    while world.now < deadline:
        world.tend()
        if world.is_calm() and world.jobs() is not None and not _unfinished(world):
            return True
        time.sleep(0.2)
    return False


def _unfinished(world: World) -> list[str]:
    """Empty also where the API does not answer."""
    jobs = world.jobs() or []
    return [
        f"{job['id']} {job['state']} at step {job['progress']['step']}" for job in jobs if job["state"] not in TERMINAL
    ]


def kinds_struck(result: Result) -> int:
    return sum(result.struck[kind] > 0 for kind in KINDS)
