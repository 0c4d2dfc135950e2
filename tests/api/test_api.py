"""The API without workers: what it accepts, what it refuses, and how it says so. On SQLite and on PostgreSQL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from jobs import lease as leases
from jobs.database import Database
from jobs.settings import Settings
from tests.api.local import local_client
from tests.conftest import Broker, job_body
from tests.jobs.test_lease import record, started, step
from trainer.methodconfig import METHOD_CONFIGS
from trainer.process import free_port


@pytest.fixture
def client(settings: Settings, database: Database) -> Iterator[TestClient]:
    with local_client(settings) as opened:
        yield opened


def test_a_job_is_accepted_while_the_broker_is_away_and_announced_later(
    client: TestClient, database: Database, broker: Broker
) -> None:
    answer = client.post("/v1/jobs", json=job_body(name="n", metadata={"team": "a"}))
    assert answer.status_code == 201
    job = answer.json()
    assert (job["state"], job["name"], job["metadata"]) == ("queued", "n", {"team": "a"})
    # Every default is filled in.
    assert job["spec"]["optimisation"]["learning_rate"] == 0.01
    assert job["spec"]["optimisation"]["micro_batch"] == 4
    assert job["spec"]["method"]["alpha"] == 0.25
    ready = client.get("/readyz").json()
    assert ready["database"] == "ok"
    assert ready["broker"].startswith("away")


def test_what_a_job_says_can_be_submitted_again(client: TestClient) -> None:
    spec = client.post("/v1/jobs", json=job_body()).json()["spec"]
    assert client.post("/v1/jobs", json=spec).json()["spec"] == spec


NOT_LONG_ENOUGH = {"source": "text", "files": ["{directory}/short.txt"], "sequence_length": 64}
BAD = [
    ({"surprise": 1}, "surprise", "not permitted"),
    ({"method": {"rank": 0}}, "method.rank", "greater than or equal to 1 (got 0)"),
    ({"method": {"rank": 65}}, "method.rank", "choose at most 64"),
    ({"method": {"period": 0}}, "method.period", "greater than or equal to 1 (got 0)"),
    ({"method": {"name": "galor"}}, "method", "'full', 'galore', 'golore'"),
    ({"method": {"alpha": "much"}}, "method.alpha", "valid number"),
    ({"method": "loro"}, "method.period", "500 is too long for this run: loro would never reach its first; choose at"),
    ({"method": "relora"}, "method.period", "choose at most 19"),
    ({"method": {"name": "relora", "period": 10}}, "method.restart_warmup", "50 is above period 10"),
    ({"method": {"name": "loro", "period": 5, "scale": 8}}, "method.scale", "random weights have no W"),
    ({"method": {"name": "loro", "period": 1}}, "method.refresh", "nothing but the sign"),
    ({"method": "golore"}, "method.random_fraction", "no switch with period 200"),
    ({"method": "galore_plus"}, "method.residual_warmup", "100 is not below the run's 20 steps"),
    ({"method": {"name": "galore_plus", "optimizer": "msgd"}}, "method.optimizer", "no second moment"),
    ({"method": {"name": "galore_plus", "head_targets": ["qproj"]}}, "method.head_targets", "'qproj' is not among"),
    (
        {"method": {"name": "garare", "rank": 40, "back_projection": "pinv"}},
        "method.rank",
        "half the 64 rows of q_proj",
    ),
    ({"method": {"name": "gasare", "rank": 4}}, "method.rank", "not permitted"),
    ({"optimisation": {"others_learning_rate": -1}}, "optimisation.others_learning_rate", "greater than 0"),
    (
        {"method": "full", "optimisation": {"others_learning_rate": 0.1}},
        "optimisation.others_learning_rate",
        "one rate",
    ),
    ({"method": {"surprise": 1}}, "method.surprise", "not permitted"),
    ({"method": "full", "optimisation": {"steps": 0}}, "optimisation.steps", "greater than or equal to 1"),
    ({"model": {"preset": "llama-2m"}}, "model.preset", "llama-1m"),
    ({"model": {"preset": "llama-tiny", "path": "/x"}}, "model", "exactly one of preset, path, hub"),
    ({"model": {"path": "models/mine"}}, "model", "exactly one"),
    ({"optimisation": {"tokens": 7}}, "optimisation.tokens", "give one of the two"),
    ({"optimisation": {"global_batch": 5}, "resources": {"processes": 2}}, "optimisation.global_batch", "processes 2"),
    ({"resources": {"hosts": 2}}, "resources.hosts", "docs/multi-node.md"),
    ({"resources": {"min_hosts": 2}}, "resources.min_hosts", "above hosts 1"),
    ({"optimisation": {"micro_batch": 3}}, "optimisation.micro_batch", "does not divide"),
    ({"optimisation": {"warmup_steps": 21}}, "optimisation.warmup_steps", "above steps 20"),
    ({"optimisation": {"dtype": "fp16"}}, "optimisation.dtype", "'fp32' or 'bf16'"),
    ({"optimisation": {"dtype": "bf16"}, "deepspeed": {"zero_stage": 0}}, "deepspeed.zero_stage", "use zero_stage 1"),
    ({"deepspeed": {"zero_stage": 0, "offload": "cpu"}}, "deepspeed.offload", "needs zero_stage"),
    ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage", "got 4"),
    ({"dataset": {"source": "text", "files": ["/no/such/file.txt"]}}, "dataset.files", "nothing matches"),
    ({"dataset": {"source": "text", "files": ["here.txt"]}}, "dataset.files", "absolute"),
    ({"dataset": {"source": "text"}}, "dataset.files", "required"),
    ({"dataset": NOT_LONG_ENOUGH}, "dataset.sequence_length", "need 128"),
    ({"dataset": {"sequence_length": 1}}, "dataset.sequence_length", "got 1"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
    ({"name": ""}, "name", "at least 1"),
    ({"name": "a\x00b"}, "name", "U+0000"),
    ({"metadata": {"k": "a\x00b"}}, "metadata", "U+0000"),
    ({"tokenizer": "a\ud800"}, "tokenizer", "surrogate"),
    ({"a\ud800": 1}, "a\\ud800", "surrogate"),
    ({"optimisation": {"steps": 10**10}}, "optimisation.steps", "2147483647"),
    ({"method": {"alpha": 1e999}}, "method.alpha", "finite"),
    ({"method": {"targets": ["q_projj"]}}, "method.targets", "no linear module of a preset"),
    ({"model": {"vocabulary": 100}}, "model.vocabulary", "257 or more"),
]


@pytest.mark.parametrize(("changes", "param", "words"), BAD, ids=[f"{p}-{n}" for n, (_, p, _) in enumerate(BAD)])
def test_bad_input_is_refused_by_name_and_leaves_nothing_behind(
    client: TestClient, tmp_path: Path, changes: dict[str, Any], param: str, words: str
) -> None:
    (tmp_path / "short.txt").write_text("Too short for two sequences.")
    body = json.loads(json.dumps(job_body(**changes)).replace("{directory}", str(tmp_path)))
    if changes.get("dataset", {}).get("source") == "text":
        body["dataset"] = json.loads(json.dumps(changes["dataset"]).replace("{directory}", str(tmp_path)))
    if changes.get("model") == {"path": "models/mine"}:
        body["model"] = {}
    # json.dumps, because the client's own encoder refuses infinity before the server can.
    answer = client.post("/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert client.get("/v1/jobs").json()["data"] == []
    assert not (tmp_path / "runs").exists()


def test_a_body_that_is_no_json_says_where(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content='{"model": }', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "at character 10" in answer.json()["error"]["message"]


def test_a_model_directory_is_looked_into(client: TestClient, tmp_path: Path) -> None:
    missing = client.post("/v1/jobs", json=job_body(model={"path": str(tmp_path)}) | {"model": {"path": str(tmp_path)}})
    assert missing.json()["error"]["param"] == "model.path"
    config = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    body = job_body() | {"model": {"path": str(tmp_path)}, "method": {"name": "galore", "rank": 20}}
    error = client.post("/v1/jobs", json=body).json()["error"]
    assert error["param"] == "method.rank"
    assert "k_proj" in error["message"]
    assert "16×32" in error["message"]


def test_unknown_things_are_404_in_the_one_shape(client: TestClient) -> None:
    for path in ("", "/events", "/metrics", "/checkpoints", "/logs"):
        answer = client.get(f"/v1/jobs/job-none{path}")
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.post("/v1/jobs/job-none/cancel").status_code == 404
    assert client.delete("/v1/jobs").json()["error"]["code"] == "method_not_allowed"
    assert client.get("/v1/jobs?limit=0").json()["error"]["param"] == "limit"
    unknown = client.get("/v1/jobs?after=job-none")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "after")
    assert client.get("/v1/jobs/%00").status_code in (400, 404)
    job = client.post("/v1/jobs", json=job_body()).json()["id"]
    for path, most in (("events", 2**63 - 1), ("metrics", 2**31 - 1)):
        assert client.get(f"/v1/jobs/{job}/{path}?after={most + 1}").status_code == 400
        assert client.get(f"/v1/jobs/{job}/{path}?after={most}").status_code == 200


def test_lists_are_newest_first_in_pages_and_filtered(client: TestClient) -> None:
    ids = [client.post("/v1/jobs", json=job_body(name=str(n))).json()["id"] for n in range(5)]
    full = client.post("/v1/jobs", json=job_body() | {"method": "full"}).json()["id"]
    client.post(f"/v1/jobs/{ids[0]}/cancel")
    seen, after = [], None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == [full, *reversed(ids)]
    assert [job["id"] for job in client.get("/v1/jobs?method=full").json()["data"]] == [full]
    assert [job["id"] for job in client.get("/v1/jobs?state=cancelled").json()["data"]] == [ids[0]]


def test_cancelling_is_idempotent_and_says_when_it_is_too_late(
    client: TestClient, database: Database, settings: Settings
) -> None:
    job = client.post("/v1/jobs", json=job_body()).json()
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    done = client.post("/v1/jobs", json=job_body()).json()
    lease = leases.claim(database, settings, done["id"], "w")
    assert lease is not None
    leases.finish(database, settings, lease, leases.Outcome("succeeded", 0))
    answer = client.post(f"/v1/jobs/{done['id']}/cancel")
    assert answer.status_code == 409
    assert "is succeeded" in answer.json()["error"]["message"]


def test_a_running_job_shows_progress_and_is_scraped(
    client: TestClient, database: Database, settings: Settings
) -> None:
    job = client.post("/v1/jobs", json=job_body(name="scraped")).json()
    lease = leases.claim(database, settings, job["id"], "w")
    assert lease is not None
    record(database, lease, [started(0), *(step(n, 5.0 - n) for n in range(1, 5))], 9)
    seen = client.get(f"/v1/jobs/{job['id']}").json()
    assert seen["progress"] == {"step": 4, "steps": 20, "ratio": 0.2, "eta_seconds": 8.0, "doing": None}
    assert seen["figures"]["loss"] == 1.0
    assert [a["outcome"] for a in seen["attempts"]] == [None]
    metrics = client.get(f"/v1/jobs/{job['id']}/metrics?after=1&limit=2").json()
    assert [p["step"] for p in metrics["points"]] == [2, 3]
    assert metrics["has_more"]
    assert metrics["last_step"] == 3
    kinds = [e["type"] for e in client.get(f"/v1/jobs/{job['id']}/events").json()["data"]]
    assert kinds == ["queued", "claimed", "started"]

    samples = scrape(client)
    labels = frozenset({("job_id", job["id"]), ("method", "galore")})
    assert samples["stiefel_job_train_loss", labels] == 1.0
    assert samples["stiefel_job_tokens_total", labels] == 40
    assert samples["stiefel_job_progress_ratio", labels] == 0.2
    assert samples["stiefel_jobs", frozenset({("state", "running"), ("method", "galore")})] == 1
    assert samples["stiefel_workers_busy", frozenset()] == 1
    assert samples["stiefel_queue_wait_seconds_count", frozenset()] == 1
    assert samples["stiefel_queue_wait_seconds_bucket", frozenset({("le", "5")})] == 1
    leases.finish(database, settings, lease, leases.Outcome("succeeded", 0))
    ended = scrape(client)
    assert ended["stiefel_jobs_finished_total", frozenset({("state", "succeeded")})] == 1
    assert ended["stiefel_job_duration_seconds_bucket", frozenset({("le", "60")})] == 1
    assert ended["stiefel_job_duration_seconds_bucket", frozenset({("le", "+Inf")})] == 1


def scrape(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_http_times_are_by_route_and_not_by_job(client: TestClient) -> None:
    client.get("/v1/jobs/job-none")
    names = {
        dict(labels).get("route") for name, labels in scrape(client) if name == "stiefel_http_request_seconds_count"
    }
    assert "/v1/jobs/{job_id}" in names
    assert not any("job-none" in str(name) for name in names)


def test_methods_are_described_with_their_schema(client: TestClient) -> None:
    methods = {m["name"]: m for m in client.get("/v1/methods").json()["data"]}
    assert methods.keys() == METHOD_CONFIGS.keys()
    assert "arXiv:2403.03507" in methods["galore"]["paper"]
    assert methods["galore"]["json_schema"]["properties"]["period"]["minimum"] == 1


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_every_method_can_be_asked_for_by_its_name_alone(client: TestClient, name: str) -> None:
    body = job_body(optimisation={"steps": 2000}) | {"method": name}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 201, answer.text
    stored = answer.json()["spec"]["method"]
    assert stored["name"] == name
    assert None not in stored.values(), "a default that depends on the model is filled in"


def test_the_api_documents_itself_with_examples_that_it_accepts(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    examples = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert client.post("/v1/jobs", json=examples["galore"]["value"]).status_code == 201
    refused = client.post("/v1/jobs", json=examples["full"]["value"]).json()["error"]
    assert refused["param"] == "dataset.files"  # its files are not on this machine; everything else is right


def test_a_database_that_is_away_is_503_and_worth_a_retry(tmp_path: Path) -> None:
    away = Settings(home=tmp_path, auth="off", database_url=f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none")
    with local_client(away) as client:
        answer = client.get("/v1/jobs")
        assert answer.status_code == 503
        assert "x-should-retry" not in answer.headers
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_an_error_of_our_own_is_500_with_an_id_that_is_in_the_log(
    client: TestClient, database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("api.routes.jobs.store.get", breaks)
    answer = client.get("/v1/jobs/job-x", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine-1"
    assert "mine-1" in answer.json()["error"]["message"]
    [said] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert vars(said)["request_id"] == "mine-1"
    assert "a mistake" in caplog.text


def test_every_answer_has_a_request_id(client: TestClient) -> None:
    assert client.get("/healthz").headers["x-request-id"]
    assert client.post("/v1/jobs", json={}).headers["x-request-id"]
