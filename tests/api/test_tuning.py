"""/v1/fine_tuning/jobs, driven by OpenAI's client as it is: shapes, resolution, refusals, pages, repetitions."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jobs import inputs, keys, submission
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.settings import Settings
from jobs.tables import Job
from tests.api.protocol import served, typed, upload
from tests.api.room import SMALL, Room


def test_a_job_has_every_field_of_openai_s_type_and_every_setting_as_it_was_resolved(room: Room) -> None:
    training, validation = room.upload(examples=1000), room.upload(examples=10)
    job = room.create(
        file=training,
        validation_file=validation,
        seed=7,
        suffix="mine",
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 5, "learning_rate_multiplier": 0.5}},
        },
        extra={"optimizer": SMALL | {"period": 50}, "deepspeed": {"zero_stage": 1}, "priority": 3},
    )
    typed(job)
    assert job.id.startswith("ftjob-") and job.status == "queued"
    assert (job.model, job.seed, job.metadata, job.integrations) == ("llama-tiny", 7, {"team": "a"}, [])
    assert (job.training_file, job.validation_file, job.result_files) == (training, validation, [])
    assert (job.error, job.finished_at, job.fine_tuned_model, job.trained_tokens) == (None, None, None, None)
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": 5, "learning_rate_multiplier": 0.5}
    assert job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.to_dict() == job.hyperparameters.to_dict()
    assert job.optimizer["period"] == 50 and job.optimizer["rank"] == 8
    assert (job.deepspeed["zero_stage"], job.priority, job.optimisation["steps"]) == (1, 3, 400)
    usual = room.create(file=training).optimisation["learning_rate"]
    assert job.optimisation["learning_rate"] == pytest.approx(usual / 2)
    assert room.jobs.retrieve(job.id) == job
    # The same job by the other name that it has.
    other = room.client.get(f"/jobs/{job.id.removeprefix('ft')}", cast_to=object)
    assert other["spec"]["task"] == "finetune" and other["name"] == "mine"


@pytest.mark.parametrize(("examples", "batch"), [(1, 1), (5, 4), (4, 4), (700, 8), (1700, 16), (9000, 32), (10**6, 32)])
def test_what_is_auto_is_resolved_and_told(room: Room, examples: int, batch: int) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = room.create(file=room.upload(examples=examples), hyperparameters=auto, extra={"optimizer": {"rank": 8}})
    assert job.hyperparameters.to_dict() == {"n_epochs": 3, "batch_size": batch, "learning_rate_multiplier": 1.0}
    assert job.optimizer["name"] == "galore"
    assert job.optimisation["steps"] == -(-examples * 3 // batch)
    assert 0 <= job.seed < 2**31


def test_the_batch_of_auto_divides_by_the_ranks(room: Room) -> None:
    extra = {"optimizer": SMALL, "resources": {"processes": 3}, "optimisation": {"micro_batch": 2}}
    assert room.create(file=room.upload(examples=900), extra=extra).hyperparameters.batch_size == 12


def test_settings_may_stand_among_the_hyperparameters(room: Room) -> None:
    inside = {"n_epochs": 1, "optimizer": SMALL, "deepspeed": {"zero_stage": 3}}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": inside}}
    job = room.create(method=method, extra={"deepspeed": {"zero_stage": 3, "offload": "cpu"}})
    assert (job.optimizer["rank"], job.deepspeed["zero_stage"], job.deepspeed["offload"]) == (8, 3, "cpu")


def test_our_own_types_of_method(room: Room) -> None:
    labelled = room.upload(format="labelled", columns={"text": "sentence"}, examples=40)
    method: Any = {"type": "classify", "classify": {"hyperparameters": {"n_epochs": 2}}}
    job = room.create(file=labelled, method=method)
    assert (job.method.type, job.dataset["columns"], job.dataset["examples"]) == ("classify", {"text": "sentence"}, 40)
    extra: dict[str, Any] = {"dataset": {"glue": "SST-2"}}
    job = room.create(file=labelled, method=method, extra=extra)
    assert (job.dataset["glue"], job.dataset["columns"], job.dataset["examples"]) == ("sst2", {}, 40)
    method = {"type": "pretrain"}
    extra = {"optimizer": SMALL, "optimisation": {"steps": 5}, "dataset": {"sequence_length": 4}}
    job = room.create(method=method, extra=extra)
    assert (job.dataset["source"], job.optimisation["steps"], job.hyperparameters.n_epochs) == ("jsonl", 5, None)


def hyper(**given: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}


INSIDE = "method.supervised.hyperparameters"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"model": "nothing like this"}, "model"),
        ({"model": "ft:llama-tiny::00000000000000000000"}, "model"),
        ({"file": "file-000000000000000000000000"}, "training_file"),
        ({"file": "/etc/passwd"}, "training_file"),
        ({"validation_file": "file-1"}, "validation_file"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 10**6}}, "hyperparameters.n_epochs"),
        (hyper(batch_size="many"), f"{INSIDE}.batch_size"),
        (hyper(batch_size=10**9), f"{INSIDE}.batch_size"),
        (hyper(learning_rate_multiplier=-1.0), f"{INSIDE}.learning_rate_multiplier"),
        (hyper(learning_rate_multiplier=1e9), f"{INSIDE}.learning_rate_multiplier"),
        (hyper(epochs=3), f"{INSIDE}.epochs"),
        (hyper(optimizer={"rank": 9}), f"{INSIDE}.optimizer.rank"),
        (hyper(n_epochs=1) | {"hyperparameters": {"n_epochs": 2}}, f"{INSIDE}.n_epochs"),
        ({"extra": {"optimiser": {}}}, "optimiser"),
        ({"extra": {"optimizer": 3}}, "optimizer"),
        ({"extra": {"optimizer": {"name": "adam"}}}, "optimizer"),
        ({"extra": {"optimizer": {"name": "galore", "rank": 0}}}, "optimizer.rank"),
        ({"extra": {"optimizer": {"name": "galore", "rank": 4000}}}, "optimizer.rank"),
        ({"extra": {"optimizer": {"name": "galore", "ranks": 8}}}, "optimizer.ranks"),
        (hyper(optimizer={"name": "galore", "rank": 4000}) | {"extra": {}}, f"{INSIDE}.optimizer.rank"),
        ({"extra": {"optimizer": SMALL, "deepspeed": {"zero_stage": 4}}}, "deepspeed.zero_stage"),
        ({"extra": {"optimizer": SMALL, "dataset": {"files": ["/etc/passwd"]}}}, "dataset.files"),
        ({"extra": {"optimizer": SMALL, "dataset": {"source": "text"}}}, "dataset.source"),
        ({"extra": {"optimizer": SMALL, "optimisation": {"epochs": 2}}, "hyperparameters": {"n_epochs": 3}}, None),
        ({"extra": {"optimizer": SMALL, "optimisation": {"steps": 2}}, "hyperparameters": {"n_epochs": 3}}, None),
        ({"extra": {"optimizer": SMALL, "resources": {"hosts": 2}}}, "resources.hosts"),
        ({"extra": {"optimizer": SMALL, "priority": 1000}}, "priority"),
    ],
)
def test_what_is_wrong_is_told_by_the_name_that_the_user_wrote_and_asked_once(
    room: Room, given: dict[str, Any], param: str | None
) -> None:
    error = room.refusal(openai.BadRequestError, **given)
    assert isinstance(error.body, dict)
    assert error.param is not None
    if param is None:
        assert error.param.startswith("optimisation.")
    else:
        assert error.param == param
    assert error.param in error.body["message"]
    assert not list(room.jobs.list())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "error", "status_details": "line 3: no messages"}, "line 3: no messages"),
        ({"format": "labelled"}, "labelled"),
        ({"purpose": "fine-tune-results"}, "fine-tune-results"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(room: Room, changes: dict[str, Any], words: str) -> None:
    error = room.refusal(openai.BadRequestError, file=room.upload(**changes))
    assert error.param == "training_file" and words in error.message


def test_every_refusal_is_the_client_s_own_exception(open_settings: Settings) -> None:
    database = Database(open_settings.url)
    closed = open_settings.model_copy(update={"auth": "on"})
    with served(closed) as service:
        _, mine = keys.create(database, "mine", [Scope.WRITE], Quotas(queued=1))
        _, reader = keys.create(database, "reader", [Scope.READ], Quotas())
        room, owner = Room(service, database), keys.identify(database, mine)
        assert owner is not None
        file = room.upload(owner=owner.owner)
        room.client = service.client("sk-wrong")
        room.refusal(openai.AuthenticationError, file=file)
        room.client = service.client(reader)
        room.refusal(openai.PermissionDeniedError, file=file)
        # Somebody else's file is not there.
        _, other = keys.create(database, "other", [Scope.WRITE], Quotas())
        room.client = service.client(other)
        assert room.refusal(openai.BadRequestError, file=file).param == "training_file"
        room.client = service.client(mine)
        assert room.refusal(openai.PermissionDeniedError, file=file, model="/etc").param == "model"
        job = room.create(file=file)
        assert room.refusal(openai.RateLimitError, file=file).code == "quota_exceeded"
        assert job.organization_id == owner.owner
        room.jobs.cancel(job.id)
        with pytest.raises(openai.ConflictError) as conflict:
            room.jobs.resume(job.id)
        assert job.id in conflict.value.message
        room.client = service.client(other)
        for ask in (room.jobs.retrieve, room.jobs.cancel, room.jobs.list_events, room.jobs.pause):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(job.id)
            assert job.id in caught.value.message
        assert not list(room.jobs.list())
        paths = [path for _, path in service.asked]
        assert len(paths) == len(service.asked) == 13
    database.close()


def test_jobs_come_in_pages_newest_first_and_by_their_metadata(settings: Settings, database: Database) -> None:
    with served(settings) as service:
        room = Room(service, database)
        file = room.upload()
        made = [room.create(file=file, metadata={"odd key.": str(number % 2)}).id for number in range(5)]
        bare = room.create(file=file).id
        assert [job.id for job in room.jobs.list(limit=2)] == [bare, *reversed(made)]
        assert len([path for method, path in service.asked if method == "GET"]) == 3
        assert [job.id for job in room.jobs.list(metadata={"odd key.": "1"})] == [made[3], made[1]]
        assert not list(room.jobs.list(metadata={"odd key.": "1", "other": ""}))
        assert [job.id for job in room.jobs.list(extra_query={"metadata": "null"})] == [bare]
        page = room.jobs.list(limit=2, after=made[2])
        assert ([job.id for job in page.data], page.has_more) == ([made[1], made[0]], False)
        for query in ({"after": "ftjob-unknown"}, {"limit": 0}, {"limit": 101}):
            with pytest.raises(openai.BadRequestError):
                room.jobs.list(**query)


def test_a_create_that_is_sent_again_makes_no_second_job(settings: Settings, database: Database) -> None:
    with served(settings) as service:
        room = Room(service, database)
        file = room.upload()
        service.lost = 2
        job = room.create(file=file)
        assert [path for _, path in service.asked] == ["/v1/fine_tuning/jobs"] * 3
        assert [one.id for one in room.jobs.list()] == [job.id]
        # Somebody who asks twice for the same wants two.
        assert room.create(file=file).id != job.id
        key = {"Idempotency-Key": "mine"}
        made = [room.create(file=file, extra_headers=key) for _ in range(2)]
        assert made[0] == made[1]
        with pytest.raises(openai.ConflictError):
            room.jobs.create(model="ours", training_file=file, extra_headers=key)


def test_a_repetition_needs_no_second_place_in_the_queue(open_settings: Settings) -> None:
    database = Database(open_settings.url)
    row, key = keys.create(database, "one", [Scope.WRITE], Quotas(queued=1))
    with served(open_settings.model_copy(update={"auth": "on"})) as service:
        client: Any = service.client(key)
        given = {"model": "llama-tiny", "training_file": upload(database, service.settings, row.id)}
        service.lost = 1
        job = client.fine_tuning.jobs.create(**given, extra_body={"optimizer": SMALL})
        assert [one.id for one in client.fine_tuning.jobs.list()] == [job.id]
    database.close()


def test_the_first_of_two_requests_finds_what_the_second_has_made(room: Room) -> None:
    """Its client has given it up, and the repetition was through first."""
    job = room.create(extra_headers={"x-stainless-retry-count": "1"})
    with room.database.transaction() as session:
        row = session.get(Job, job.id.removeprefix("ft"))
        assert row is not None and row.tuning is not None and row.tuning["again"]
        wanted = submission.Tuning({}, row.request_hash or "", row.created_at - 1, again=False)
        assert submission.sent_before(session, "", wanted) is row
        later = submission.Tuning({}, row.request_hash or "", row.created_at + 1, again=False)
        assert submission.sent_before(session, "", later) is None


def test_two_repetitions_at_once_make_one_job(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is there yet when the other looks, unless they look one after the other."""
    both, look = threading.Barrier(2), submission.sent_before

    def looked(*given: Any) -> Job | None:
        found = look(*given)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(2)
        return found

    monkeypatch.setattr("jobs.submission.sent_before", looked)
    with served(settings) as service, ThreadPoolExecutor(2) as pool:
        room = Room(service, database)
        file = room.upload()
        again = {"x-stainless-retry-count": "1"}
        made = list(pool.map(lambda _: room.create(file=file, extra_headers=again).id, range(2)))
        assert made[0] == made[1] and both.broken
        assert [one.id for one in room.jobs.list()] == made[:1]


def test_a_file_that_is_being_checked_is_waited_for(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    file = room.upload(status="uploaded")
    monkeypatch.setattr("jobs.inputs.PATIENCE_SECONDS", 0.0)
    with pytest.raises(openai.ConflictError) as caught:
        room.service.client(max_retries=0).fine_tuning.jobs.create(model="ours", training_file=file)
    assert caught.value.param == "training_file"
    # It may be checked the next time: the client asks again by itself.
    assert "x-should-retry" not in caught.value.response.headers
    assert "retry-after" in caught.value.response.headers


def test_waiting_for_files_leaves_threads_for_others(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.inputs._WAITING", threading.BoundedSemaphore(1))
    assert inputs._WAITING.acquire(blocking=False)
    client = room.service.client(max_retries=0)
    with pytest.raises(openai.ConflictError, match="still being checked"):
        client.fine_tuning.jobs.create(model="ours", training_file=room.upload(status="uploaded"), timeout=10)


def test_a_job_of_the_other_door_is_not_shown_here(room: Room) -> None:
    body = {"model": "llama-tiny", "dataset": "python-stdlib", "method": SMALL, "optimisation": {"steps": 2}}
    other: Any = room.client.post("/jobs", body=body, cast_to=object)
    assert not list(room.jobs.list())
    with pytest.raises(openai.NotFoundError):
        room.jobs.retrieve(f"ft{other['id']}")


def test_files_and_fine_tuned_models_have_their_names_at_the_other_door_too(room: Room) -> None:
    first, second = room.upload(examples=6), room.upload(examples=4)
    body: dict[str, Any] = {
        "task": "finetune",
        "model": "llama-tiny",
        "dataset": {"source": "examples", "files": [first, second], "validation_files": [second]},
        "method": SMALL,
        "optimisation": {"epochs": 1, "global_batch": 5},
    }
    made: Any = room.client.post("/jobs", body=body, cast_to=object)
    dataset = made["spec"]["dataset"]
    assert (dataset["examples"], dataset["format"], made["spec"]["optimisation"]["steps"]) == (10, "text", 2)
    assert all(Path(file).is_file() for file in (*dataset["files"], *dataset["validation_files"]))
    with pytest.raises(openai.ConflictError):
        room.client.files.delete(first)
    for wrong, param in (
        ({"model": {"hub": "ft:llama-tiny::00000000000000000000"}}, "model.hub"),
        ({"dataset": body["dataset"] | {"files": ["file-000000000000000000000000"]}}, "dataset.files"),
        ({"dataset": body["dataset"] | {"examples": 11}}, "dataset.examples"),
        ({"dataset": body["dataset"] | {"format": "chat"}}, "dataset.format"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            room.client.post("/jobs", body=body | wrong, cast_to=object)
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"\ud800": 1}, "\\ud800"),
        ({"hyperparameters": {"\ud800": 1}}, "hyperparameters"),
        ({"tokenizer": "\ud800"}, "tokenizer"),
        ({"dataset": {"columns": {"prompt": "\ud800"}}}, "dataset"),
        ({"metadata": {"a": "\x00"}}, "metadata"),
    ],
)
def test_what_no_answer_could_show_is_refused_and_leaves_no_job(room: Room, given: dict[str, Any], param: str) -> None:
    body = {"model": "llama-tiny", "training_file": room.upload(examples=10)} | given
    # Their client cannot even send it.
    url, headers = f"{room.client.base_url}fine_tuning/jobs", {"content-type": "application/json"}
    answer = httpx.post(url, content=json.dumps(body), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert room.jobs.list().data == []
