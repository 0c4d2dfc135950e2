"""Each fault: what it does to the world, and what it undoes later. Only processes that the stack has started are hit.

A fault answers with what it has hit, or with None where nothing of its kind was there.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import psutil

from tests.chaos.plan import KINDS, Fault
from tests.chaos.specs import SPECS
from tests.chaos.world import World
from tests.system.processes import TrainerProcess, alive, kill, resume, suspend

Hit = str | None
Item = TypeVar("Item")


def strike(world: World, fault: Fault) -> Hit:
    return _FAULTS[fault.kind](world, fault)


def _chosen(candidates: Sequence[Item], pick: float) -> Item | None:
    return candidates[int(pick * len(candidates))] if candidates else None


def _one(name: str) -> Callable[[World, Fault], Hit]:
    def killed(world: World, fault: Fault) -> Hit:
        if not world.is_up(name):
            return None
        world.take_down(name, seconds=fault.seconds)
        world.kill(name)
        return f"{name} for {fault.seconds:g} s"

    return killed


def _stop(world: World, processes: Iterable[psutil.Process], seconds: float) -> None:
    stopped = list(processes)
    suspend(stopped)
    world.later(seconds, lambda: resume(stopped))


def _stopped(name: str) -> Callable[[World, Fault], Hit]:
    def stopped(world: World, fault: Fault) -> Hit:
        if not world.is_up(name):
            return None
        _stop(world, [psutil.Process(world.stack.pid(name))], fault.seconds)
        return f"{name} for {fault.seconds:g} s"

    return stopped


# --------------------------------------------------------------------------------------------------------------- worker


def _busy_first(world: World) -> list[str]:
    """Workers, those with a trainer if there are any."""
    names = world.workers()
    busy = {one.worker for one in world.trainers()}
    return [name for name in names if name in busy] or names


def _supervisors(world: World, name: str) -> list[psutil.Process]:
    try:
        main = psutil.Process(world.stack.pid(name))
        return [main, *(child for child in main.children() if alive(child))]
    except psutil.NoSuchProcess:
        return []


def _worker_main_killed(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    if name is None:
        return None
    world.take_down(name, seconds=fault.seconds)
    world.kill(name)
    return f"{name} for {fault.seconds:g} s"


def _worker_child_killed(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    children = _supervisors(world, name)[1:] if name else []
    if not children:
        return None
    kill(children)
    return f"{name}'s"


def _worker_killed(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    if name is None:
        return None
    world.take_down(name, seconds=fault.seconds)
    children = _supervisors(world, name)[1:]
    world.kill(name)
    kill(children)
    return f"{name}, both processes, for {fault.seconds:g} s"


def _worker_told_to_end(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    if name is None:
        return None
    world.take_down(name, seconds=fault.seconds)
    psutil.Process(world.stack.pid(name)).terminate()
    return name


def _worker_stopped(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    if name is None:
        return None
    _stop(world, _supervisors(world, name), fault.seconds)
    return f"{name} for {fault.seconds:g} s"


def _worker_and_trainer_stopped(world: World, fault: Fault) -> Hit:
    name = _chosen(_busy_first(world), fault.pick)
    if name is None:
        return None
    trainers = [one.process for one in world.trainers() if one.worker == name]
    _stop(world, [*_supervisors(world, name), *trainers], fault.seconds)
    return f"{name} and {len(trainers)} processes of its trainer for {fault.seconds:g} s"


# -------------------------------------------------------------------------------------------------------------- trainer


def _whole_trainer(world: World, fault: Fault) -> tuple[str, list[psutil.Process]]:
    found = world.trainers()
    job_id = _chosen(sorted({one.job_id for one in found}), fault.pick)
    return job_id or "", [one.process for one in found if one.job_id == job_id]


def _trainer_killed(world: World, fault: Fault) -> Hit:
    job_id, processes = _whole_trainer(world, fault)
    kill(processes)
    return f"{job_id}, {len(processes)} processes" if processes else None


def _trainer_stopped(world: World, fault: Fault) -> Hit:
    job_id, processes = _whole_trainer(world, fault)
    if not processes:
        return None
    _stop(world, processes, fault.seconds)
    return f"{job_id}, {len(processes)} processes, for {fault.seconds:g} s"


def _of_ranks(world: World, is_meant: Callable[[TrainerProcess], bool], pick: float) -> TrainerProcess | None:
    """Of trainers with several ranks alone."""
    found = world.trainers()
    several = {one.job_id for one in found if one.role == "torchrun"}
    meant = [one for one in found if one.job_id in several and is_meant(one)]
    return _chosen(sorted(meant, key=lambda one: (one.job_id, one.role)), pick)


def _killed_of_ranks(is_meant: Callable[[TrainerProcess], bool]) -> Callable[[World, Fault], Hit]:
    def killed(world: World, fault: Fault) -> Hit:
        one = _of_ranks(world, is_meant, fault.pick)
        if one is None:
            return None
        kill([one.process])
        return f"{one.role} of {one.job_id}"

    return killed


def _rank_stopped(world: World, fault: Fault) -> Hit:
    one = _of_ranks(world, lambda one: one.role.startswith("rank"), fault.pick)
    if one is None:
        return None
    _stop(world, [one.process], fault.seconds)
    return f"{one.role} of {one.job_id} for {fault.seconds:g} s"


# -------------------------------------------------------------------------------------------------- broker and database


def _broker_emptied(world: World, fault: Fault) -> Hit:
    hit = _one("broker")(world, fault)
    if hit:
        for file in (world.stack.home / "broker").glob("appendonlydir/*"):
            file.unlink()
    return hit


def _database_locked(world: World, fault: Fault) -> Hit:
    """As by a tool that copies the file, or somebody at a prompt."""
    connection = sqlite3.connect(world.stack.home / "stiefel.db", timeout=1, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        connection.close()
        return None
    world.later(fault.seconds, connection.close)
    return f"for {fault.seconds:g} s"


def _database_killed(world: World, fault: Fault) -> Hit:
    if world.server is None or not world.server.processes:
        return None
    world.take_down("postgresql", seconds=fault.seconds)
    world.server.kill()
    return f"for {fault.seconds:g} s"


def _database_connections_cut(world: World, fault: Fault) -> Hit:
    if world.server is None or not world.server.processes:
        return None
    return f"{world.server.cut_connections()} of them"


def _power_cut(world: World, fault: Fault) -> Hit:
    everything = world.everything()
    world.take_down(*world.stack.children, "postgresql", seconds=fault.seconds)
    kill(everything)
    return f"{len(everything)} processes for {fault.seconds:g} s"


# ---------------------------------------------------------------------------------------------------------------- users


def _paused_and_resumed(world: World, fault: Fault) -> Hit:
    wanted = [job for job in world.jobs() or [] if job["state"] in ("queued", "running")]
    job = _chosen([job for job in wanted if job["id"] not in world.cancelled], fault.pick)
    if job is None:
        return None
    world.ask("POST", f"/v1/jobs/{job['id']}/pause")
    world.later(fault.seconds, lambda: _until_answered(world, f"/v1/jobs/{job['id']}/resume"))
    return f"{job['id']}, which was {job['state']}, for {fault.seconds:g} s"


def _cancelled(world: World, fault: Fault) -> Hit:
    """A job of its own, which gets so far as it may until then."""
    spec = _chosen(world.specs, fault.pick)
    assert spec is not None
    job_id = world.submit(spec, SPECS[spec])
    if job_id is None:
        return None
    world.cancelled.add(job_id)
    world.later(fault.seconds, lambda: _until_answered(world, f"/v1/jobs/{job_id}/cancel"))
    return f"{job_id}, a new {spec}, after {fault.seconds:g} s"


def _submitted_in_an_outage(world: World, fault: Fault) -> Hit:
    """The API alone is there."""
    names = [name for name in ("broker", "reaper", *world.workers()) if world.is_up(name)]
    world.take_down(*names, seconds=fault.seconds)
    for name in names:
        world.kill(name)
    spec = _chosen(world.specs, fault.pick)
    assert spec is not None
    job_id = world.submit(spec, SPECS[spec])
    return f"{job_id or 'refused'}, a new {spec}, without {', '.join(names)}" if names else None


def _until_answered(world: World, path: str) -> None:
    """What the user wants is asked for until it is answered, be it with a refusal because the job has ended."""
    answer = world.ask("POST", path)
    if answer is None or answer.status_code >= 500:
        world.later(0.5, lambda: _until_answered(world, path))


_FAULTS: dict[str, Callable[[World, Fault], Hit]] = {
    "api_killed": _one("api"),
    "reaper_killed": _one("reaper"),
    "reaper_stopped": _stopped("reaper"),
    "worker_main_killed": _worker_main_killed,
    "worker_child_killed": _worker_child_killed,
    "worker_killed": _worker_killed,
    "worker_told_to_end": _worker_told_to_end,
    "worker_stopped_briefly": _worker_stopped,
    "worker_stopped_for_long": _worker_stopped,
    "worker_and_trainer_stopped_for_long": _worker_and_trainer_stopped,
    "trainer_killed": _trainer_killed,
    "trainer_stopped_briefly": _trainer_stopped,
    "trainer_stopped_for_long": _trainer_stopped,
    "rank_killed": _killed_of_ranks(lambda one: one.role.startswith("rank")),
    "rank_stopped": _rank_stopped,
    "torchrun_killed": _killed_of_ranks(lambda one: one.role == "torchrun"),
    "launcher_killed": _killed_of_ranks(lambda one: one.role == "trainer"),
    "broker_killed": _one("broker"),
    "broker_emptied": _broker_emptied,
    "broker_stopped": _stopped("broker"),
    "database_locked": _database_locked,
    "database_killed": _database_killed,
    "database_killed_for_long": _database_killed,
    "database_connections_cut": _database_connections_cut,
    "power_cut": _power_cut,
    "paused_and_resumed": _paused_and_resumed,
    "cancelled": _cancelled,
    "submitted_in_an_outage": _submitted_in_an_outage,
}
assert _FAULTS.keys() == KINDS.keys()
