"""What a worker has, and what its trainer sees of it."""

from pathlib import Path

import pytest

from jobs.settings import Settings
from worker.devices import NoGpus, card, environment


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def devices(tmp_path: Path, *numbers: int) -> Path:
    """A /dev with these GPUs, and the files that come with any."""
    made = tmp_path / "dev"
    made.mkdir()
    for name in (*(f"nvidia{number}" for number in numbers), "nvidiactl", "nvidia-uvm", "null"):
        (made / name).touch()
    return made


def test_named_gpus_are_its_own(tmp_path: Path) -> None:
    found = card(Settings(home=tmp_path, gpus="2, 3"), devices(tmp_path, *range(8)))
    assert (found.gpus, found.devices, found.device) == (("2", "3"), 2, "gpu")
    assert found.name.endswith(":2,3")


def test_unnamed_it_has_what_the_driver_lists_or_what_it_was_limited_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card(Settings(home=tmp_path), devices(tmp_path, 3, 5, 6)).gpus == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-def")
    assert card(Settings(home=tmp_path), tmp_path).gpus == ("GPU-abc", "GPU-def")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,-1,2")
    assert card(Settings(home=tmp_path), tmp_path).gpus == ("3",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert card(Settings(home=tmp_path), tmp_path).device == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert card(Settings(home=tmp_path), tmp_path).device == "cpu"


def test_without_gpus_it_has_cpu_slots(tmp_path: Path) -> None:
    assert card(Settings(home=tmp_path, cpu_slots=5), tmp_path).devices == 5
    assert card(Settings(home=tmp_path), tmp_path).devices >= 2
    assert card(Settings(home=tmp_path, gpus="none"), devices(tmp_path, 0, 1)).device == "cpu"


def test_one_that_is_to_have_gpus_does_not_go_on_without(tmp_path: Path) -> None:
    with pytest.raises(NoGpus, match="STIEFEL_GPUS=all, and there is no .*nvidia0"):
        card(Settings(home=tmp_path, gpus="all"), tmp_path)
    assert card(Settings(home=tmp_path, gpus="all"), devices(tmp_path, 0, 1)).gpus == ("0", "1")


def test_a_trainer_sees_as_many_gpus_as_its_job_asks_for() -> None:
    assert environment(("4", "5", "6"), 2, "gpu") == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert environment((), 2, "cpu") == {"CUDA_VISIBLE_DEVICES": ""}
