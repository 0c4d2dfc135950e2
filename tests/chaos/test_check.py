"""The checker finds what is planted, and the watch sees what is there: no check that cannot fail."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.check import Seen, broken
from tests.chaos.specs import Curve
from tests.system.processes import trainer_processes
from tests.system.watch import Overlap, Watch

CURVE = Curve(tuple((step, 1 / step) for step in range(1, 11)), ((0, 9.0), (5, 4.0), (10, 1.0)))
GOOD = Seen("job-1", "spec", "succeeded", "", CURVE, ("lost", "succeeded"), ("succeeded",), 10)
CANCELLED = replace(
    GOOD,
    state="cancelled",
    curve=Curve(CURVE.points[:4], CURVE.evaluations[:1]),
    attempts=("stopped",),
    endings=("cancelled",),
    checkpoint=4,
)


def promises(job: Seen, cancelled: bool = False) -> list[str]:
    ids = [job.job_id] if cancelled else []
    return [found.promise for found in broken([job], ["job-1"], ids, {"spec": CURVE})]


def with_points(*points: tuple[int, float]) -> Seen:
    return replace(GOOD, curve=replace(CURVE, points=points))


def test_what_is_well_is_found_well() -> None:
    assert promises(GOOD) == []
    assert promises(GOOD, cancelled=True) == []
    assert promises(CANCELLED, cancelled=True) == []


@pytest.mark.parametrize(
    ("job", "promise"),
    [
        pytest.param(
            with_points(*CURVE.points[:5], CURVE.points[4], *CURVE.points[5:]),
            "each step once and in order",
            id="doubled",
        ),
        pytest.param(with_points(*CURVE.points[:3], *CURVE.points[4:]), "each step once and in order", id="gap"),
        pytest.param(with_points(*CURVE.points[1:]), "each step once and in order", id="no first step"),
        pytest.param(with_points(*CURVE.points[::-1]), "each step once and in order", id="disorder"),
        pytest.param(with_points(*CURVE.points[:9]), "the curve is complete", id="no last step"),
        pytest.param(with_points(), "the curve is complete", id="no points"),
        pytest.param(
            with_points(*CURVE.points[:9], (10, 0.1 + 1e-9)), "the curve is the undisturbed one", id="wrong loss"
        ),
        pytest.param(
            replace(GOOD, curve=replace(CURVE, evaluations=CURVE.evaluations[:2])),
            "the curve is complete",
            id="no last evaluation",
        ),
        pytest.param(
            replace(GOOD, curve=replace(CURVE, evaluations=((0, 9.0), (5, 4.5), (10, 1.0)))),
            "the curve is the undisturbed one",
            id="wrong evaluation",
        ),
        pytest.param(
            replace(GOOD, state="failed", endings=("failed",)), "every accepted job ends as wanted", id="failed"
        ),
        pytest.param(replace(GOOD, state="queued", endings=()), "every accepted job ends as wanted", id="not ended"),
        pytest.param(CANCELLED, "every accepted job ends as wanted", id="cancelled by nobody"),
        pytest.param(replace(GOOD, endings=("succeeded", "succeeded")), "a job ends once", id="ended twice"),
        pytest.param(replace(GOOD, checkpoint="damaged"), "checkpoints are never corrupted", id="damaged"),
        pytest.param(replace(GOOD, checkpoint=5), "what was trained is kept", id="old checkpoint"),
        pytest.param(replace(GOOD, checkpoint=None), "what was trained is kept", id="no checkpoint"),
    ],
)
def test_what_is_planted_is_found(job: Seen, promise: str) -> None:
    assert promises(job) == [promise]


def test_a_job_that_is_missing_is_found() -> None:
    (found,) = broken([], ["job-1"], [], {"spec": CURVE})
    assert (found.promise, found.where) == ("no accepted job is lost", "job-1")


def test_a_wrong_loss_in_a_cancelled_job_is_found() -> None:
    wrong = replace(CANCELLED, curve=replace(CANCELLED.curve, points=((1, 1.0), (2, 0.6))))
    assert promises(wrong, cancelled=True) == ["the curve is the undisturbed one"]


def test_overlaps_and_what_is_left_are_broken_promises() -> None:
    overlap = Overlap(1.0, 2.0, "job-1", ((1, 1.0), (2, 1.0)), ("1 trainer", "2 trainer"))
    found = broken([GOOD], ["job-1"], [], {"spec": CURVE}, [overlap], ["process 7"])
    assert [b.promise for b in found] == [
        "one trainer of a job, and one on a worker's GPUs",
        "nothing outlives the stack",
    ]


@pytest.fixture
def impostors() -> Iterator["Impostors"]:
    with ExitStack() as stack:
        yield Impostors(stack)


class Impostors:
    """Processes that look like trainers. Each has a child that looks like it, as a launcher of ranks has."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def start(self, runs: Path, job_id: str, worker: str) -> None:
        code = (
            "import os, time\n"
            "parent = os.getpid()\n"
            "if os.fork(): print(flush=True)\n"
            "while os.getpid() == parent or os.getppid() == parent: time.sleep(0.05)"
        )
        process = self.stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", code, str(runs / job_id)],
                env={"STIEFEL_WORKER": worker},
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        )
        self.stack.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()


def test_the_watch_takes_a_trainer_with_its_children_for_one(tmp_path: Path, impostors: Impostors) -> None:
    impostors.start(tmp_path, "job-a", "worker-1")
    impostors.start(tmp_path, "job-b", "worker-2")
    assert len(trainer_processes(tmp_path)) == 4
    watch = Watch(tmp_path)
    watch.look()
    assert watch.most == {"job-a": 1, "worker-1": 1, "job-b": 1, "worker-2": 1}
    assert watch.overlaps == []


@pytest.mark.parametrize(
    ("second", "where"), [(("job-a", "worker-2"), "job-a"), (("job-b", "worker-1"), "worker-1")], ids=["job", "worker"]
)
def test_the_watch_sees_two_trainers_where_one_may_be(
    tmp_path: Path, impostors: Impostors, second: tuple[str, str], where: str
) -> None:
    impostors.start(tmp_path, "job-a", "worker-1")
    impostors.start(tmp_path, *second)
    watch = Watch(tmp_path)
    watch.look()
    assert [overlap.where for overlap in watch.overlaps] == [where]
