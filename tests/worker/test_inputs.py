"""A job that starts from another's model: made once, readable to its trainer alone, needed until it has ended."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import access, inputs, models, store, submission, wishes
from jobs import lease as leases
from jobs.database import Database
from jobs.errors import Forbidden, ModelInUse, ModelNotFound, Refused
from jobs.keys import EVERYBODY, Caller, Scope
from jobs.locks import Locks
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import CheckpointRow, Job
from jobs.workers import Card
from migrations.__main__ import upgrade
from tests.conftest import job_body
from trainer.exporting import tidy
from trainer.rundir import RunDir
from worker import inputs as made
from worker.supervise import run_next

CARD = Card("w", "host", "0", (), 2)
SHORT = {"global_batch": 2}


class Place:
    """An installation that lets jobs read nothing of its disk, and its worker."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, auth="on", lease_seconds=30, poll_seconds=0.1, check_files=True)
        upgrade(self.settings.url)
        self.database = Database(self.settings.url)

    def submit(self, model: dict[str, str], steps: int = 4) -> Job:
        kept = {"every": steps // 2, "keep": 1, "keep_best": False}
        body = job_body(optimisation=SHORT | {"steps": steps}, checkpoints=kept)
        request = JobRequest.model_validate(body | {"model": model})
        found = inputs.resolve(self.database, self.settings, EVERYBODY, request)
        access.refuse(self.settings, found.spec, found.granted)
        return submission.create(self.database, self.settings, request, inputs=found)

    def run(self, job: Job) -> Job:
        run_next(self.database, self.settings, CARD, job.id, lambda: False)
        return store.get(self.database, job.id)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made_here = Place(tmp_path)
    yield made_here
    made_here.database.close()


def test_a_model_is_made_once_and_trained_on(place: Place, tmp_path: Path) -> None:
    first = place.run(place.submit({"preset": "llama-tiny"}))
    assert first.state == State.SUCCEEDED, first.error
    name = models.name_of(first)
    assert name == f"ft:llama-tiny::{first.id.removeprefix('job-')}"
    for gone in (f"{name}:ckpt-step-2", name.replace("llama-tiny", "other"), "ft:llama-tiny::0123456789abcdef0123"):
        with pytest.raises(ModelNotFound):
            models.find(place.database, place.settings, EVERYBODY, gone)
    with pytest.raises(ModelNotFound):
        models.find(place.database, place.settings, Caller("somebody", frozenset({Scope.WRITE})), name)
    with pytest.raises(Refused, match="of step 2 is kept, only of 4"):
        place.submit({"hub": f"{name}:ckpt-step-2"})

    rundir = RunDir(first.run_directory)
    (rundir.exports / ".step-00000004.partial-1").mkdir(parents=True)  # of an exporter that was killed
    second = place.submit({"hub": name})
    assert (second.base_run, second.base_step) == (first.id, 4)
    with pytest.raises(ModelInUse, match=second.id):
        wishes.remove(place.database, first.id)
    with pytest.raises(ModelInUse):
        wishes.remove_model(place.database, first)
    # Its path is what the trainer gets, and nobody else.
    path = str(rundir.export(4))
    assert second.spec["model"] == {"path": path, "weights": "pretrained"}
    with pytest.raises(Forbidden, match=r"model\.path"):
        place.submit({"path": path})
    before = first.storage_bytes
    second = place.run(second)
    assert store.get(place.database, first.id).storage_bytes == before
    assert second.state == State.SUCCEEDED, second.error
    names = ["lock", "step-00000004", "step-00000004.used"]
    assert sorted(entry.name for entry in rundir.exports.iterdir()) == names
    by_hand = tmp_path / "by-hand"
    subprocess.run([sys.executable, "-m", "trainer", "export", first.run_directory, by_hand], check=True)
    weights = "model.safetensors"
    assert (rundir.export(4) / weights).read_bytes() == (by_hand / weights).read_bytes()

    # Once more: it is there, and nobody makes it again.
    before = (rundir.export(4) / weights).stat().st_mtime_ns
    needed = made.needs(place.database, second)
    again = made.make(place.settings, RunDir(second.run_directory), needed, {}, threading.Event())
    assert again is not None and again.granted == (path,)
    assert (rundir.export(4) / weights).stat().st_mtime_ns == before
    # While an attempt is under way it stays, and afterwards it is the cache's.
    tidy(place.settings.runs, 0)
    assert rundir.export(4).is_dir()
    again.close()
    tidy(place.settings.runs, 0)
    assert not rundir.export(4).exists()
    wishes.remove_model(place.database, first)
    assert not rundir.exports.exists() and not rundir.checkpoints.exists() and rundir.log.exists()
    with pytest.raises(ModelNotFound, match="deleted"):
        models.find(place.database, place.settings, EVERYBODY, name)
    # What was trained from it needs it no longer.
    wishes.remove(place.database, first.id)
    assert not rundir.root.exists()
    export = [sys.executable, "-m", "trainer", "export", second.run_directory, tmp_path / "child"]
    subprocess.run(export, check=True)
    assert (tmp_path / "child" / weights).read_bytes() != (by_hand / weights).read_bytes()


def test_a_checkpoint_that_others_start_from_stays_while_they_have_not_ended(place: Place) -> None:
    first = place.submit({"preset": "llama-tiny"})
    with place.database.transaction() as session:
        row = {"at": 0.0, "path": "", "bytes": 1, "seconds": 0.0, "stalled_seconds": 0.0}
        session.add(CheckpointRow(job_id=first.id, step=2, **row))
    second = place.submit({"hub": models.name_of(first, 2)})
    wishes.pause(place.database, second.id)
    lease = leases.claim(place.database, place.settings, first.id, "w")
    assert lease is not None
    assert leases.wishes(place.database, lease).held == {2}
    leases.finish(place.database, place.settings, lease, leases.Outcome("stopped"))
    first = place.run(first)
    assert first.state == State.SUCCEEDED, first.error
    steps = [path.name for path in sorted(RunDir(first.run_directory).checkpoints.iterdir())]
    assert steps == ["step-00000002", "step-00000004"]  # of which the job itself keeps one
    wishes.resume(place.database, second.id)
    second = place.run(second)
    assert second.state == State.SUCCEEDED, second.error


def test_what_is_held_is_told_while_the_trainer_runs(place: Place) -> None:
    first = place.submit({"preset": "llama-tiny"}, steps=400)
    with ThreadPoolExecutor(1) as aside:
        running = aside.submit(place.run, first)
        rundir = RunDir(first.run_directory)
        deadline = time.monotonic() + 60
        while not (found := newest_of(place, first)):
            assert time.monotonic() < deadline and not running.done()
            time.sleep(0.02)
        second = place.submit({"hub": found})
        while not rundir.held.exists() or json.loads(rundir.held.read_text()) != [second.base_step]:
            assert time.monotonic() < deadline and not running.done()
            time.sleep(0.02)
        wishes.cancel(place.database, place.settings, second.id)
        while json.loads(rundir.held.read_text()):
            assert time.monotonic() < deadline and not running.done()
            time.sleep(0.02)
        wishes.cancel(place.database, place.settings, first.id)
        assert running.result(60).state == State.CANCELLED


def newest_of(place: Place, job: Job) -> str | None:
    """The name of its newest checkpoint."""
    with place.database.reading() as session:
        steps = models.kept_steps(session, job)
    return models.name_of(job, steps[-1]) if steps else None


def test_a_base_that_is_gone_or_being_made_elsewhere_is_told(place: Place) -> None:
    base = RunDir(place.settings.runs / "job-base")
    needed = made.Needs((), (base, 4), ())
    with pytest.raises(made.Unmade, match="is gone") as caught:
        made.make(place.settings, RunDir(place.settings.home), needed, {}, threading.Event())
    assert caught.value.outcome.error is not None and caught.value.outcome.error["code"] == "bad_checkpoint"
    base.root.mkdir(parents=True)
    base.spec.write_text("{}")
    other = Locks([base.exports / "lock"])
    assert other.try_acquire()
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    assert made.make(place.settings, RunDir(place.settings.home), needed, {}, cancelled) is None
    other.release()
