"""Files of a paused job are damaged, as by a disk or an operator; it is resumed, and nobody can tell from its curve."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.service import Service, running
from trainer.checkpoint.place import Directory
from trainer.checkpoint.reading import read
from trainer.errors import CheckpointError

JOB = {"optimisation": {"steps": 150, "evaluate_every": 150}, "checkpoints": {"every": 30, "keep": 3}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("damage")) as started:
        yield started


def finish(service: Service, job_id: str) -> list[tuple[int, float]]:
    service.http.post(f"/v1/jobs/{job_id}/resume")
    service.wait(job_id, "succeeded")
    return service.curve(job_id)


def test_a_checkpoint_that_was_cut_short_is_passed_over_for_the_one_before(
    service: Service, undisturbed: list[tuple[int, float]], paused: str
) -> None:
    place = Directory(service.rundir(paused).checkpoints)
    *_, before, newest = place.complete_steps()
    file = Path(place.url(newest)) / "rank-00.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="damaged"):
        read(place, newest)
    assert finish(service, paused) == undisturbed
    started = [
        event["step"]
        for event in service.http.get(f"/v1/jobs/{paused}/events?limit=1000").json()["data"]
        if event["type"] == "started"
    ]
    assert started == [0, before]


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x00\xff\x80 not JSON\n" * 3, id="garbage"),
        pytest.param(b'{"type":"step","step":99,"loss":', id="torn"),
        pytest.param(b"\x00" * 5000 + b"\r" + b"\xff" * 300 + b"\r\n" + b"half\rline", id="carriage-returns"),
    ],
)
def test_garbage_in_the_events_costs_none_of_them(
    service: Service, undisturbed: list[tuple[int, float]], paused: str, garbage: bytes
) -> None:
    with service.rundir(paused).events.open("ab") as file:
        file.write(garbage)
    assert finish(service, paused) == undisturbed
    events = service.http.get(f"/v1/jobs/{paused}/events?limit=1000").json()["data"]
    kinds = [event["type"] for event in events]
    assert kinds.count("finished") == 1
    checkpointed = [event["step"] for event in events if event["type"] == "checkpointed"]
    assert checkpointed == sorted(set(checkpointed))


@pytest.mark.parametrize("remaining", [0.0, 0.5])
def test_events_that_were_cut_below_what_is_stored_cost_none_of_those_that_follow(
    service: Service, undisturbed: list[tuple[int, float]], paused: str, remaining: float
) -> None:
    file = service.rundir(paused).events
    with file.open("r+b") as stream:
        stream.truncate(int(file.stat().st_size * remaining))
    assert finish(service, paused) == undisturbed


def test_a_job_whose_checkpoints_lie_elsewhere_goes_on_without_its_run_directory(
    service: Service, undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    """As on another machine, where workers share nothing but a store."""
    elsewhere = JOB["checkpoints"] | {"url": f"file://{tmp_path}/store"}
    job_id = service.submit(**JOB | {"checkpoints": elsewhere})
    service.wait_for_step(job_id, 65)
    service.http.post(f"/v1/jobs/{job_id}/pause")
    step = service.wait(job_id, "paused")["progress"]["step"]
    shutil.rmtree(service.rundir(job_id).root)
    assert finish(service, job_id) == undisturbed
    events = service.http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]
    assert [event["step"] for event in events if event["type"] == "started"] == [0, step]
