"""What a trainer is given by its worker, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from jobs.tables import Job
from jobs.workers import Card
from trainer.rundir import RunDir
from worker import orphans
from worker.launch import Trainer, start

SECRETS = {
    "STIEFEL_DATABASE_URL": "postgresql://somebody:hush@db/stiefel",
    "STIEFEL_REDIS_URL": "redis://:hush@broker/0",
    "STIEFEL_API_KEY": "hush",
    "PGPASSWORD": "hush",
    "CELERY_BROKER_URL": "redis://:hush@broker/0",
}


def test_a_trainer_inherits_no_secret_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run code that comes with a model."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "the trainer's own")
    show = "import os; open('environment', 'w').write('\\n'.join(f'{k}={v}' for k, v in os.environ.items()))"
    real = subprocess.Popen

    def shows(_: Any, **options: Any) -> "subprocess.Popen[bytes]":
        return real([sys.executable, "-c", show], cwd=tmp_path, **options)

    monkeypatch.setattr("worker.launch.subprocess.Popen", shows)
    card = Card("w", "host", "0", ("4", "5"), 2)
    limited = Settings(home=tmp_path, auth="on", readable="/data:/models")
    trainer = start(RunDir(tmp_path), limited, card, Job(id="job-1", devices=1), 7, [])
    while not trainer.ended:
        time.sleep(0.01)
    assert trainer.kill() == 0
    given = (tmp_path / "environment").read_text()
    assert "hush" not in given
    for line in ("HF_TOKEN=the trainer's own", "CUDA_VISIBLE_DEVICES=4", "STIEFEL_WORKER=w", "STIEFEL_JOB=job-1"):
        assert line in given
    assert "STIEFEL_READABLE=/data\n/models" in given
    assert "STIEFEL_TRUST_REMOTE_CODE=0" in given


def test_a_trainer_that_has_ended_is_collected_only_with_its_group() -> None:
    """As long as it is not, its number is nobody else's: what is killed is what was meant."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    trainer = Trainer(process)
    while not trainer.ended:
        time.sleep(0.01)
    assert trainer.ended
    assert Path(f"/proc/{trainer.pid}").exists()
    assert os.getpgid(child) == trainer.pid
    assert trainer.kill() == 0
    assert trainer.kill() == 0
    assert trainer.ended
    assert not Path(f"/proc/{trainer.pid}").exists()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


WORKER = """
import subprocess, sys, time
from pathlib import Path
from worker import orphans
orphans.adopt()
sleeper = [sys.executable, '-c', 'import time; time.sleep(600)']
# A rank in a session of its own, whose parent ends before it does.
rank_of = f"subprocess.Popen({sleeper + [sys.argv[1]]!r}, start_new_session=True, stdout=subprocess.DEVNULL)"
code = f"import subprocess; print({rank_of}.pid, flush=True)"
rank = int(subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, check=True).stdout)
other = subprocess.Popen(sleeper + [sys.argv[1] + '-other'])
print(orphans.end(Path(sys.argv[1])), Path(f'/proc/{rank}').exists(), other.poll(), flush=True)
# One that ends by itself leaves no entry in the kernel's table either.
code = "import subprocess; print(subprocess.Popen(['true'], start_new_session=True, stdout=subprocess.DEVNULL).pid)"
gone = int(subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, check=True).stdout)
while Path(f'/proc/{gone}/cmdline').exists() and Path(f'/proc/{gone}/cmdline').read_bytes():
    time.sleep(0.01)
orphans.end(Path(sys.argv[1]))
print(Path(f'/proc/{gone}').exists(), flush=True)
other.kill()
"""


def test_a_rank_whose_parents_are_gone_is_ended_and_nobody_else(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False", "None", "False"], done.stderr


def test_where_nothing_is_left_nothing_is_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as mine:
        assert orphans.end(tmp_path) == 0
        assert mine.poll() is None
        mine.send_signal(signal.SIGKILL)
