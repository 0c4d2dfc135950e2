"""What was promised, against what was seen. `broken` is pure; `gather` asks the API and reads run directories."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.chaos.specs import Curve, curve_of
from tests.chaos.world import World
from tests.system.watch import Overlap
from trainer.rundir import RunDir

TERMINAL = ("succeeded", "failed", "cancelled")
CLOSE = 5  # how many differences of a curve are named


@dataclass(frozen=True)
class Seen:
    """A job at the end. `checkpoint`: the step of the newest, or why it cannot be read; None where there is none."""

    job_id: str
    spec: str
    state: str
    error: str
    curve: Curve
    attempts: tuple[str, ...]
    endings: tuple[str, ...]  # its events that name a terminal state
    checkpoint: int | str | None


@dataclass(frozen=True)
class Broken:
    """A promise that was not kept."""

    promise: str
    where: str
    evidence: str


def gather(world: World) -> list[Seen]:
    """Every job that the API lists; the stack is calm. Raises AssertionError where the API does not answer."""
    jobs = world.jobs()
    assert jobs is not None, "the API does not answer"
    return [_seen(world, job["id"], str(job["name"])) for job in jobs]


def _seen(world: World, job_id: str, spec: str) -> Seen:
    def get(path: str = "") -> dict[str, Any]:
        answer = world.http.get(f"/v1/jobs/{job_id}{path}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    job, events = get(), get("/events?limit=1000")
    assert not events["has_more"], f"{job_id} has more than a thousand events"
    kinds = [event["type"] for event in events["data"]]
    return Seen(
        job_id,
        spec,
        state=str(job["state"]),
        error=str(job["error"] or ""),
        curve=curve_of(get("/metrics?limit=10000")),
        attempts=tuple(str(attempt["outcome"]) for attempt in job["attempts"]),
        endings=tuple(kind for kind in kinds if kind in TERMINAL),
        checkpoint=_newest_checkpoint(RunDir(str(job["run_directory"]))),
    )


def _newest_checkpoint(rundir: RunDir) -> int | str | None:
    """Its step, after all its checksums; or why there is none that can be read."""
    # Here alone: this loads torch and DeepSpeed, for which nobody who asks for help shall wait.
    from trainer.checkpoint.place import Directory
    from trainer.checkpoint.reading import newest
    from trainer.errors import CheckpointError

    place = Directory(rundir.checkpoints)
    try:
        found = newest(place)
    except CheckpointError as error:
        return str(error)
    if found and found.step != place.complete_steps()[-1]:
        return f"step {place.complete_steps()[-1]} says that it is complete, and cannot be read"
    return found.step if found else None


def broken(
    jobs: Iterable[Seen],
    accepted: Iterable[str],
    cancelled: Iterable[str],
    curves: Mapping[str, Curve],
    overlaps: Iterable[Overlap] = (),
    left: Iterable[str] = (),
) -> list[Broken]:
    """`accepted`: what was answered 201; `cancelled`: of these, what a user wanted to cancel."""
    by_id = {job.job_id: job for job in jobs}
    lost = sorted(set(accepted) - set(by_id))
    found = [Broken("no accepted job is lost", job_id, "the API does not know it") for job_id in lost]
    for job in by_id.values():
        found += _of_state(job, job.job_id in set(cancelled))
        found += _of_curve(job, curves[job.spec])
        found += _of_checkpoint(job, curves[job.spec])
    found += [
        Broken("one trainer of a job, and one on a worker's GPUs", overlap.where, _evidence(overlap))
        for overlap in overlaps
    ]
    return found + [Broken("nothing outlives the stack", process, "was still there") for process in left]


def _evidence(overlap: Overlap) -> str:
    return f"{overlap.since:.2f} to {overlap.until:.2f}: {', '.join(overlap.processes)}"


def _of_state(job: Seen, may_be_cancelled: bool) -> list[Broken]:
    wanted = ("succeeded", "cancelled") if may_be_cancelled else ("succeeded",)
    if job.state not in wanted:
        return [Broken("every accepted job ends as wanted", job.job_id, f"{job.state} {job.attempts} {job.error}")]
    if job.endings != (job.state,):
        return [Broken("a job ends once", job.job_id, f"{job.state}, but its events say {job.endings}")]
    return []


def _of_curve(job: Seen, undisturbed: Curve) -> list[Broken]:
    """A job that was cancelled has the beginning of the curve."""
    steps = [step for step, _ in job.curve.points]
    if steps != list(range(1, len(steps) + 1)):
        odd = [(before, after) for before, after in zip([0, *steps], steps, strict=False) if after != before + 1]
        return [Broken("each step once and in order", job.job_id, f"after step a comes b: {odd[:CLOSE]}")]
    if job.state == "succeeded" and len(steps) != undisturbed.steps:
        return [Broken("the curve is complete", job.job_id, f"{len(steps)} of {undisturbed.steps} steps")]
    found = []
    for kind in ("points", "evaluations"):
        mine, theirs = dict(getattr(job.curve, kind)), dict(getattr(undisturbed, kind))
        if job.state == "succeeded" and mine.keys() != theirs.keys():
            missing = sorted(mine.keys() ^ theirs.keys())
            found.append(Broken("the curve is complete", job.job_id, f"{kind} at steps {missing[:CLOSE]}"))
        wrong = [(step, loss, theirs.get(step)) for step, loss in mine.items() if loss != theirs.get(step)]
        # A job that was stopped has no evaluation that others lack: it is made at fixed steps.
        if wrong:
            evidence = f"{len(wrong)} {kind}; step, loss, undisturbed: {wrong[:CLOSE]}"
            found.append(Broken("the curve is the undisturbed one", job.job_id, evidence))
    return found


def _of_checkpoint(job: Seen, undisturbed: Curve) -> list[Broken]:
    if isinstance(job.checkpoint, str):
        return [Broken("checkpoints are never corrupted", job.job_id, job.checkpoint)]
    if job.state == "succeeded" and job.checkpoint != undisturbed.steps:
        evidence = f"the newest is of step {job.checkpoint}, training ended at {undisturbed.steps}"
        return [Broken("what was trained is kept", job.job_id, evidence)]
    return []
