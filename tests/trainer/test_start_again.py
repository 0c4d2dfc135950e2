"""python -m trainer run, through a rollback: it starts itself again, and stays what its starter has started."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.alone import alone
from tests.trainer.test_command import make, trainer
from trainer import events
from trainer.checkpoint.place import Directory
from trainer.prepare import prepare
from trainer.rundir import RunDir

# At this rate the loss is beyond all bounds after a few steps; with a thousandth of it training is quick.
WILD: dict[str, Any] = {
    "method": "full",
    "optimisation": {"steps": 12, "learning_rate": 10.0, "warmup_steps": 0, "evaluate_every": 4},
    "checkpoints": {"every": 4},
    "guard": {"on_divergence": "roll_back", "rate_factor": 0.001},
}


def steps(found: list[events.Event]) -> list[events.Step]:
    return [event for event in found if isinstance(event, events.Step)]


def check_went_back_and_on(rundir: RunDir) -> None:
    found = list(events.read(rundir.events))
    [back] = [e for e in found if isinstance(e, events.RolledBack)]
    before, after = found[: found.index(back)], found[found.index(back) :]
    assert back.step == 0
    assert [e.step for e in steps(before)] == list(range(1, back.from_step))
    assert [e.step for e in steps(after)] == list(range(1, 13))
    assert steps(before)[0].learning_rate > 9
    assert steps(after)[0].learning_rate == pytest.approx(steps(before)[0].learning_rate / 1000)
    assert steps(after)[-1].loss < steps(before)[0].loss
    assert isinstance(found[-1], events.Finished)
    assert not any(isinstance(e, events.Failed) for e in found)


def wait_until_blocked(number: signal.Signals, process: "subprocess.Popen[bytes]") -> None:
    """Until a signal of that number to the process would wait, and not for the blink in which a thread is made."""
    deadline, blocked = time.monotonic() + 60, 0
    while blocked < 3:
        status = Path(f"/proc/{process.pid}/status").read_text()
        [mask] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:")]
        blocked = blocked + 1 if mask >> (number - 1) & 1 else 0
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_process_goes_back_and_on_and_keeps_the_locks_that_it_was_given(tmp_path: Path) -> None:
    rundir, lock = make(tmp_path, "wild", **WILD), tmp_path / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with subprocess.Popen(
        trainer("run", str(rundir.root)), stdout=subprocess.PIPE, text=True, pass_fds=(descriptor,)
    ) as process:
        os.close(descriptor)
        assert process.stdout is not None
        with lock.open("rb") as other:
            held = 0
            for line in process.stdout:
                if "training from step" in line:
                    with pytest.raises(BlockingIOError):
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held += 1
            assert held == 2
            assert process.wait(60) == 0
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    check_went_back_and_on(rundir)


def test_two_ranks_go_back_and_on(tmp_path: Path) -> None:
    rundir = make(tmp_path, "pair", resources={"processes": 2}, **WILD)
    done = subprocess.run(trainer("run", str(rundir.root)), stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    check_went_back_and_on(rundir)
    assert "going back to step 0, at 0.001 × the learning rate" in done.stdout
    assert {e.processes for e in events.read(rundir.events) if isinstance(e, events.Started)} == {2}


def test_a_stop_file_is_obeyed_without_a_start(tmp_path: Path) -> None:
    rundir = make(tmp_path, "stopped", **WILD | {"optimisation": WILD["optimisation"] | {"evaluate_every": 1}})
    prepare(alone(tmp_path), rundir, 0, lambda _: None, lambda: False)  # else it would stop before it trains
    rundir.stop.touch()
    subprocess.run(trainer("run", str(rundir.root)), check=True, stdout=subprocess.DEVNULL)
    found = list(events.read(rundir.events))
    assert [type(e) for e in found[-2:]] == [events.RolledBack, events.Stopped]
    assert sum(isinstance(e, events.Started) for e in found) == 1
    assert Directory(rundir.checkpoints).complete_steps() == [found[-1].step] == [0]


def test_a_signal_between_the_two_programs_is_obeyed(tmp_path: Path) -> None:
    long = {"optimisation": WILD["optimisation"] | {"steps": 5000}}
    rundir = make(tmp_path, "signalled", **WILD | long)
    with subprocess.Popen(trainer("run", str(rundir.root)), stdout=subprocess.DEVNULL) as process:
        wait_until_blocked(signal.SIGTERM, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    found = list(events.read(rundir.events))
    assert [type(e) for e in found if isinstance(e, events.RolledBack | events.Started | events.Stopped)] == [
        events.Started,
        events.RolledBack,
        events.Started,
        events.Stopped,
    ]
    assert found[-1].step == 1
    assert Directory(rundir.checkpoints).complete_steps() == [0, 1]


def test_rolled_back_often_enough_it_fails(tmp_path: Path) -> None:
    slight = {"guard": WILD["guard"] | {"rate_factor": 0.999, "most_rollbacks": 1}}
    rundir = make(tmp_path, "often", **WILD | slight)
    done = subprocess.run(
        trainer("run", str(rundir.root)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 67
    assert "has gone back 1 times, guard.most_rollbacks allows no more" in done.stderr
    kinds = [type(e) for e in events.read(rundir.events) if isinstance(e, events.RolledBack | events.Failed)]
    assert kinds == [events.RolledBack, events.Failed]


def test_by_default_a_loss_that_is_no_number_ends_the_run_as_diverged(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=261, num_key_value_heads=2, **sizes))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes", "method": "full"}
    rundir = make(tmp_path, "nan", **changes, dataset={"validation_fraction": 0})
    done = subprocess.run(
        trainer("run", str(rundir.root)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 67
    assert "step 1: loss nan" in done.stderr
    failed = json.loads(rundir.events.read_text().splitlines()[-1])
    assert (failed["type"], failed["reason"], failed["retryable"]) == ("failed", "divergence", False)


def test_the_new_program_has_what_the_first_was_given_and_nothing_else(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from trainer.process import Origin\n"
        "origin, log, given = Origin(), Path(sys.argv[1]), int(sys.argv[2])\n"
        "names = [os.readlink(f'/proc/self/fd/{path.name}') for path in Path('/dev/fd').iterdir()\n"
        "         if os.path.exists(path)]\n"
        "line = [os.getpid(), sys.flags.utf8_mode, os.environ.get('OURS'), os.fstat(given).st_ino,\n"
        "        any(name.endswith('leaked') for name in names)]\n"
        "log.open('a').write(repr(line) + '\\n')\n"
        "os.environ['OURS'] = 'changed'\n"
        "leaked = os.open(log.with_name('leaked'), os.O_CREAT)\n"
        "os.set_inheritable(leaked, True)  # as native code does that does not care\n"
        "if len(log.read_text().splitlines()) < 2:\n"
        "    origin.again()\n"
    )
    descriptor = os.open(tmp_path, os.O_RDONLY)
    command = [sys.executable, "-X", "utf8=1", str(program), str(tmp_path / "log"), str(descriptor)]
    environment = os.environ | {"OURS": "given", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, pass_fds=(descriptor,), env=environment)
    os.close(descriptor)
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == second
    assert ", 'given', " in second
    assert second.endswith("False]")
