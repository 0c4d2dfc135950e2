"""/v1/models, driven by OpenAI's client: what is there, whose it is, and what of it can be deleted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from jobs import inputs, keys, lease, reports, submission
from jobs.database import Database
from jobs.errors import Refused
from jobs.keys import EVERYBODY, Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from migrations.__main__ import upgrade
from tests.api.protocol import Served, served, typed, upload
from tests.conftest import job_body
from trainer import events
from trainer.process import free_port
from trainer.rundir import RunDir

OURS = {"optimizer": {"name": "galore", "rank": 8}}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Served, Database]]:
    directory = _model_directory(tmp_path)
    settings = Settings(
        home=tmp_path,
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        models={"gpt-of-ours": {"path": str(directory)}, "of/hub": {"hub": "somebody/model"}},
    )
    upgrade(settings.url)
    database = Database(settings.url)
    with served(settings) as running:
        yield running, database
    database.close()


def test_models_are_those_of_the_operator_the_presets_and_one_s_own(service: tuple[Served, Database]) -> None:
    running, database = service
    client, owner = _somebody(running, database)
    other, _ = _somebody(running, database)
    listed = client.models.list().data
    assert [model.id for model in listed[:3]] == ["gpt-of-ours", "of/hub", "llama-tiny"]
    for model in (listed[0], client.models.retrieve("of/hub")):
        typed(model)
        assert model.owned_by == "operator"
    # The operator's name allows what the path by itself would not.
    file = upload(database, running.settings, owner)
    job = client.fine_tuning.jobs.create(model="gpt-of-ours", training_file=file, suffix="a b", extra_body=OURS)
    with pytest.raises(openai.PermissionDeniedError) as denied:
        path = str(running.settings.home / "model")
        client.fine_tuning.jobs.create(model=path, training_file=file, extra_body=OURS)
    assert denied.value.param == "model"
    assert len(client.models.list().data) == len(listed)
    _succeed(running.settings, database, job.id.removeprefix("ft"))
    name = f"ft:gpt-of-ours:a-b:{job.id.removeprefix('ftjob-')}"
    assert client.models.list().data[-1].id == name
    checkpoint = client.models.retrieve(f"{name}:ckpt-step-2")
    typed(checkpoint)
    assert checkpoint.owned_by == owner
    assert len(other.models.list().data) == len(listed)
    for ask in (other.models.retrieve, other.models.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(name)
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


def test_a_fine_tuned_model_can_be_deleted_and_nothing_else(service: tuple[Served, Database]) -> None:
    running, database = service
    client, owner = _somebody(running, database)
    file = upload(database, running.settings, owner)
    job = client.fine_tuning.jobs.create(model="gpt-of-ours", training_file=file, extra_body=OURS)
    rundir = _succeed(running.settings, database, job.id.removeprefix("ft"))
    name = str(client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model)
    for kept in ("gpt-of-ours", "llama-tiny", f"{name}:ckpt-step-4"):
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete(kept)
    for unknown in ("nothing", "ft:a:b:c", "somebody/model", f"{name}:ckpt-step-3"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(unknown)
    # It is made from the other's checkpoint, which is therefore still needed.
    second = client.fine_tuning.jobs.create(model=name, training_file=file, extra_body=OURS)
    with pytest.raises(openai.ConflictError) as needed:
        client.models.delete(name)
    assert needed.value.code == "model_in_use"
    with pytest.raises(openai.BadRequestError) as too_much:
        large = {"optimizer": {"name": "galore", "rank": 4000}}
        client.fine_tuning.jobs.create(model=name, training_file=file, extra_body=large)
    assert too_much.value.param == "optimizer.rank"
    client.fine_tuning.jobs.cancel(second.id)
    request = JobRequest.model_validate(job_body() | {"model": {"hub": name}})
    resolved = inputs.resolve(database, running.settings, EVERYBODY, request)
    deleted = client.models.delete(name)
    typed(deleted)
    assert deleted.deleted and not rundir.checkpoints.exists() and rundir.log.exists()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    assert not list(client.fine_tuning.jobs.checkpoints.list(job.id))
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.models.retrieve(name)
    # Who had found it a moment before gets no job that starts from nothing.
    with pytest.raises(Refused, match="deleted meanwhile"):
        submission.create(database, running.settings, request, inputs=resolved)
    asked = [path for method, path in running.asked if method == "DELETE"]
    assert len(asked) == 5  # and none of them twice


def _somebody(running: Served, database: Database) -> tuple[Any, str]:
    row, key = keys.create(database, "somebody", [Scope.WRITE], Quotas())
    return running.client(key), row.id


def _succeed(settings: Settings, database: Database, job_id: str) -> RunDir:
    taken = lease.claim(database, settings, job_id, "w:0")
    assert taken is not None
    rundir = RunDir(settings.runs / job_id)
    rundir.checkpoint(4).mkdir(parents=True)
    rundir.log.write_text("said\n")
    told: list[events.Event] = [events.Checkpointed(step=s, path="", bytes=1, seconds=0.1) for s in (2, 4)]
    reports.record(database, taken, list(enumerate(told, 1)), len(told))
    lease.finish(database, settings, taken, lease.Outcome("succeeded", 0))
    return rundir


def _model_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    sizes = '"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 176, "num_hidden_layers": 2'
    (directory / "config.json").write_text(f'{{"model_type": "llama", {sizes}}}')
    return directory
