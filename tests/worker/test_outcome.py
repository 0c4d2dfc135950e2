"""How an attempt ended, from what its trainer said and did."""

import signal
from pathlib import Path

import pytest

from trainer import events
from trainer.rundir import RunDir
from worker.kernel import out_of_memory_kills
from worker.outcome import outcome_of


def failed(reason: str) -> events.Failed:
    return events.Failed(step=3, reason=reason, message="why", retryable=False, rank=1)


@pytest.mark.parametrize(
    ("exit_code", "found", "kernel_kills", "expected"),
    [
        (68, [failed("out_of_memory_device")], 0, "out_of_memory_device"),
        (1, [failed("of a later version")], 0, "unknown"),
        (69, [failed("host_gone")], 0, "infrastructure"),
        # Killed between a rollback and the new start: the job goes on.
        (-9, [events.RolledBack(step=1, from_step=4, rate_scale=0.5, reason="why")], 0, "killed"),
        (-signal.SIGKILL, [], 0, "killed"),
        (-signal.SIGKILL, [], 1, "out_of_memory_host"),
        (-signal.SIGSEGV, [], 1, "killed"),
        (128 + signal.SIGBUS, [], 0, "killed"),
        (67, [], 0, "divergence"),
        (1, [], 0, "unknown"),
        (255, [], 0, "unknown"),
    ],
)
def test_each_end_has_a_class_and_says_what_is_known(
    tmp_path: Path, exit_code: int, found: list[events.Event], kernel_kills: int, expected: str
) -> None:
    (tmp_path / "log.txt").write_text("the last words\n")
    outcome = outcome_of(RunDir(tmp_path), exit_code, found, killed=False, kernel_kills=kernel_kills)
    assert outcome.kind == "failed"
    assert outcome.error is not None
    assert outcome.error["code"] == expected
    assert outcome.error["exit_code"] == exit_code
    assert "the last words" in outcome.error["log_tail"]
    if exit_code in (-9, -11, 128 + signal.SIGBUS):
        assert outcome.error["signal"] == signal.Signals(abs(exit_code) % 128).name
        assert found or outcome.error["signal"] in outcome.error["message"] or expected == "out_of_memory_host"


def test_the_kernel_s_count_is_read_in_both_forms(tmp_path: Path) -> None:
    assert out_of_memory_kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert out_of_memory_kills(tmp_path) == 3
    (tmp_path / "memory.events").write_text("low 0\nhigh 2\nmax 5\noom 1\noom_kill 7\n")
    assert out_of_memory_kills(tmp_path) == 7
