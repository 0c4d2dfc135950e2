"""An API and a generator, each a process of its own, with a tiny model and a job that has trained one."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from sqlalchemy import update

from jobs import keys, models, submission
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import CheckpointRow, Job
from migrations.__main__ import upgrade
from tests.conftest import job_body
from tests.trainer.speech import speaking_model
from trainer.process import free_port
from trainer.rundir import RunDir

SECONDS = 60.0


@dataclass
class Talk:
    """`bare` is a directory without a chat template, as the alias `bare`; `directory` that of the alias `tiny`."""

    home: Path
    directory: Path
    settings: Settings
    database: Database
    api_url: str
    key: str
    generator: subprocess.Popen[bytes]

    def client(self, **changes: Any) -> OpenAI:
        return OpenAI(**({"base_url": f"{self.api_url}/v1", "api_key": self.key, "timeout": SECONDS} | changes))

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.settings.generator_url}/healthz", timeout=5).json())

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"still waiting for {what}"
            time.sleep(0.05)

    def job(self, state: State, steps: tuple[int, ...], **changes: Any) -> Job:
        """A row, with rows of checkpoints; nothing is trained."""
        (owner,) = {key.id for key in keys.list_keys(self.database) if key.name == "somebody"}
        job = submission.create(self.database, self.settings, JobRequest.model_validate(job_body(**changes)), owner)
        with self.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job.id).values(state=state))
            for step in steps:
                row = {"at": 0.0, "path": "", "bytes": 1, "seconds": 0.0, "stalled_seconds": 0.0}
                session.add(CheckpointRow(job_id=job.id, step=step, **row))
        return job

    def trained(self) -> tuple[str, RunDir]:
        """(name of a model that a job has made, its run directory): trained by the trainer, in this moment."""
        job = self.job(State.SUCCEEDED, (2, 4), optimisation={"steps": 4, "global_batch": 2}, checkpoints={"every": 2})
        rundir = RunDir(job.run_directory)
        rundir.root.mkdir(parents=True)
        rundir.spec.write_text(json.dumps(job.spec))
        subprocess.run([sys.executable, "-m", "trainer", "run", str(rundir.root)], check=True, capture_output=True)
        return models.name_of(job), rundir


@contextmanager
def talking(home: Path, waiting: int = 1) -> Iterator[Talk]:
    directory = speaking_model(home / "tiny", context=8192)
    bare = speaking_model(home / "bare", seed=1, template=None)
    aliases = {"tiny": {"path": str(directory)}, "bare": {"path": str(bare)}, "new": {"preset": "llama-tiny"}}
    settings = Settings(
        home=home,
        database_url=f"sqlite:///{home / 'test.db'}",
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        generator_url=f"http://127.0.0.1:{free_port()}",
        generator_secret=secrets.token_hex(16),
        models=aliases,
    )
    upgrade(settings.url)
    database = Database(settings.url)
    _, key = keys.create(database, "somebody", [Scope.WRITE], Quotas())
    names = ("home", "database_url", "redis_url", "generator_url", "generator_secret")
    environment = os.environ | {f"STIEFEL_{name.upper()}": str(getattr(settings, name)) for name in names}
    # Names that nobody has are looked for at the hub: not from here.
    environment |= {"STIEFEL_MODELS": json.dumps(aliases), "HF_HUB_OFFLINE": "1"}
    api_port, generator_port = free_port(), settings.generator_url.rpartition(":")[2]
    serve = ["trainer", "serve", "--port", generator_port, "--device", "cpu", "--waiting", str(waiting)]
    commands = {"generator": serve, "api": ["api", "--port", str(api_port)]}
    processes = {}
    try:
        for name, command in commands.items():
            with (home / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        api_url = f"http://127.0.0.1:{api_port}"
        talk = Talk(home, directory, settings, database, api_url, key, processes["generator"])
        for url in (api_url, settings.generator_url):
            talk.until(partial(_answers, f"{url}/healthz"), f"{url} to answer")
        yield talk
    except BaseException:
        for name in commands:
            print(f"--- {name}\n{(home / f'{name}.log').read_text(errors='replace')[-3000:]}")
        raise
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(SECONDS)
        database.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
