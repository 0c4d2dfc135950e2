"""Checkpoints in an object store: a real S3-compatible server."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs

from tests.s3 import S3
from tests.trainer.alone import make_run
from tests.trainer.test_checkpoint import everything
from trainer import events
from trainer.checkpoint import reading
from trainer.checkpoint.place import Remote, place_of
from trainer.errors import RolledBackError, SpecError, TrainerError
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.zero import shape_of

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def store(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A bucket's file system."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fs, _ = url_to_fs("s3://bucket", use_listings_cache=False, skip_instance_cache=True)
    fs.makedirs("bucket", exist_ok=True)
    if fs.exists("bucket/runs"):
        fs.rm("bucket/runs", recursive=True)
    return fs


def start(directory: Path, **changes: Any) -> tuple[Run, list[events.Event]]:
    checkpoints = {"url": "s3://bucket/runs", "keep": 2} | changes.pop("checkpoints", {})
    return make_run(directory, checkpoints=checkpoints, **changes)


def place(run: Run) -> Remote:
    found = place_of(run.spec, run.rundir)
    assert isinstance(found, Remote)
    return found


def test_a_run_goes_on_on_another_machine_from_what_is_in_the_store(store: Any, tmp_path: Path) -> None:
    run, found = start(tmp_path / "here")
    for _ in range(4):
        run.train_step(lambda: False)
        run.save(wait=False)
    run.commit()
    before = everything(run)
    paths = [e.path for e in found if isinstance(e, events.Checkpointed)]
    assert paths[-1] == "s3://bucket/runs/run/step-00000004"
    assert place(run).complete_steps() == [3, 4]
    assert sorted(path.rpartition("/")[2] for path in store.ls("bucket/runs/run/step-00000004", detail=False)) == [
        "COMPLETE",
        "rank-00.safetensors",
        "state.json",
    ]
    # Nothing of it is left on this machine.
    assert not list(RunDir(tmp_path / "here" / "run").root.rglob("*.safetensors"))

    there, _ = start(tmp_path / "there")
    assert there.step == 4
    after = everything(there)
    assert all((after[key] == value) is True or bool((after[key] == value).all()) for key, value in before.items())
    assert not list(RunDir(tmp_path / "there" / "run").root.rglob("*.safetensors"))


def test_another_machine_goes_on_behind_a_rollback(store: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"guard": {"on_divergence": "roll_back"}}
    run, _ = start(tmp_path / "here", **changes)
    run.save()  # of step 0, which the check of the place at a start must leave alone
    for scale in (0.5, 0.25):
        for _ in range(2):
            run.train_step(lambda: False)
        norm = run.model.get_parameter("model.norm.weight")
        run.shards.write(norm, torch.full(shape_of(norm), float("nan")))
        with pytest.raises(RolledBackError):
            run.train_step(lambda: False)
        run, _ = start(tmp_path / f"there, {scale}", **changes)
        assert (run.step, run.resumed, run.guard.rate_scale) == (0, True, scale)


def test_a_damaged_object_is_noticed_and_the_checkpoint_before_is_used(store: Any, tmp_path: Path) -> None:
    run, _ = start(tmp_path)
    for _ in range(2):
        run.train_step(lambda: False)
        run.save()
    name = "bucket/runs/run/step-00000002/rank-00.safetensors"
    content = bytearray(store.cat_file(name))
    content[len(content) // 2] ^= 1
    store.pipe_file(name, bytes(content))
    again, _ = start(tmp_path)
    assert again.step == 1


def test_what_a_killed_writer_has_left_does_not_count_and_is_removed(store: Any, tmp_path: Path) -> None:
    run, _ = start(tmp_path)
    run.train_step(lambda: False)
    run.save()
    for name in ("rank-00.safetensors", "state.json"):
        store.pipe_file(f"bucket/runs/run/step-00000007/{name}", b"half")
    again, _ = start(tmp_path)
    assert again.step == 1
    again.train_step(lambda: False)
    again.save()
    assert not store.exists("bucket/runs/run/step-00000007/state.json")
    assert place(again).complete_steps() == [1, 2]


def test_a_store_that_is_away_is_told_at_the_start_and_ends_a_run_that_cannot_write(
    server: S3, store: Any, tmp_path: Path
) -> None:
    run, _ = start(tmp_path)
    run.train_step(lambda: False)
    run.save()
    server.kill()
    try:
        run.train_step(lambda: False)
        with pytest.raises(OSError, match="s3://bucket/runs/run: list: EndpointConnectionError"):
            run.save()
        with pytest.raises(TrainerError, match="checkpoints.url: s3://bucket/runs/other") as refused:
            start(tmp_path / "other", checkpoints={"url": "s3://bucket/runs/other"})
        assert refused.value.retryable
    finally:
        server.start()
    again, _ = start(tmp_path)
    assert again.step == 1


def test_the_newest_is_exported_from_the_store(store: Any, tmp_path: Path) -> None:
    run, _ = start(tmp_path)
    run.train_step(lambda: False)
    run.save(loss=2.0)
    state = json.loads(place(run).read(1, "state.json"))
    assert (state["step"], state["loss"]) == (1, 2.0)
    found = reading.newest(place(run))
    assert found is not None
    assert (found.step, found.loss) == (1, 2.0)
    place(run).release(1)
    assert not found.directory.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://bucket/runs", "nowhere:// .* is nothing that fsspec knows"),
        ("gs://bucket/runs", "needs a package that is not installed here"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_at_the_start(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"checkpoints.url: .*{message}"):
        start(tmp_path, checkpoints={"url": url})


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    run, _ = start(tmp_path, checkpoints={"url": f"file://{tmp_path}/all"})
    run.train_step(lambda: False)
    run.save()
    assert (tmp_path / "all" / "run" / "step-00000001" / "COMPLETE").exists()
    shutil.rmtree(tmp_path / "run")
    again, _ = start(tmp_path, checkpoints={"url": f"file://{tmp_path}/all"})
    assert again.step == 1
