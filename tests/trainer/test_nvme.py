"""What a machine must have for state and parameters in files, and where they go. That training from them is the same:
tests/distributed/test_nvme.py."""

from pathlib import Path

import pytest

from tests.trainer.alone import alone
from trainer import nvme
from trainer.config import DeepSpeedSpec, TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir


def settings(disk: Path) -> DeepSpeedSpec:
    return DeepSpeedSpec(zero_stage=3, offload="nvme", nvme_path=str(disk))


def told(spec: DeepSpeedSpec) -> list[str]:
    said: list[str] = []
    nvme.check(spec, said.append)
    return said


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has all of it; nothing is compiled."""
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr(nvme.AsyncIOBuilder, "load", lambda *_, **__: None)
    monkeypatch.setattr(nvme.resource, "getrlimit", lambda _: (nvme.resource.RLIM_INFINITY,) * 2)


def test_where_it_can_be_only_compiling_is_told(tmp_path: Path) -> None:
    assert told(settings(tmp_path)) == ["loading DeepSpeed's asynchronous I/O, which is compiled at its first use"]
    assert told(DeepSpeedSpec()) == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_installed_compiled_is_loaded_without_asking_for_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    monkeypatch.setattr(nvme, "installed_ops", {"async_io": 1})
    monkeypatch.setattr(nvme, "accelerator_name", nvme.get_accelerator().device_name())
    assert told(settings(tmp_path)) == []
    # For another accelerator it would be compiled.
    monkeypatch.setattr(nvme, "accelerator_name", "other")
    with pytest.raises(SpecError, match="libaio is not found"):
        told(settings(tmp_path))


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="deepspeed.nvme_path: .*missing' is no directory"):
        told(settings(tmp_path / "missing"))


def test_a_file_system_without_direct_io_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As opening does there: on Linux's tmpfs before 6.6, and on many network file systems.
    monkeypatch.setattr(nvme.os, "O_DIRECT", 1 << 30)
    monkeypatch.setattr(nvme.os, "open", refuse)
    with pytest.raises(SpecError, match="deepspeed.nvme_path: .* no direct I/O .*choose a directory on a disk"):
        told(settings(tmp_path))


def refuse(*_: object) -> int:
    raise OSError(22, "Invalid argument")


def test_a_limit_on_locked_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setattr(nvme.Path, "read_text", lambda _: "CapEff:\t0000000000000000\n")
    with pytest.raises(SpecError, match="deepspeed.offload: .*ulimit -l unlimited"):
        told(settings(tmp_path))
    monkeypatch.setattr(nvme.Path, "read_text", lambda _: "CapEff:\t0000000000004000\n")
    assert told(settings(tmp_path))


def test_what_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(SpecError, match="deepspeed.offload: nvme needs .*libaio is not found.* install libaio-dev"):
        told(settings(tmp_path))


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    nvme.check_room(settings(tmp_path), 1, "parameters")
    with pytest.raises(SpecError, match=r"deepspeed.nvme_path: .* GB free, and the parameters .* need 1000000000.0;"):
        nvme.check_room(settings(tmp_path), 10**18, "parameters")


def wanted(tmp_path: Path, disk: Path) -> TrainingSpec:
    return alone(tmp_path, deepspeed=settings(disk).model_dump())


def test_runs_share_a_disk_and_leave_nothing_on_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    spec = wanted(tmp_path, disk)
    # Of one name, in different places.
    runs = [RunDir(tmp_path / place / "run") for place in "ab"]
    contexts = [nvme.own_directory(spec, rundir, rank) for rundir in runs for rank in (0, 1)]
    paths = [Path(str(context.__enter__().deepspeed.nvme_path)) for context in contexts]
    assert len({*paths}) == 4
    assert all(path.is_dir() and disk in path.parents for path in paths)
    for context in contexts:
        context.__exit__(None, None, None)
    assert list(disk.iterdir()) == []


def test_what_a_killed_process_has_left_is_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    spec = wanted(tmp_path, tmp_path)
    killed = nvme.own_directory(spec, RunDir(tmp_path / "run"), 0)
    left = Path(str(killed.__enter__().deepspeed.nvme_path)) / "left.swp"
    left.touch()
    with nvme.own_directory(spec, RunDir(tmp_path / "run"), 0) as own:
        assert own.deepspeed.nvme_path == str(left.parent)
        assert not left.exists()
