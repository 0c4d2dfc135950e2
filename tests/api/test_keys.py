"""Who may ask for what: API keys, their scopes, and how much each may use. On SQLite and on PostgreSQL."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from api.limits import Rates, TooManyRequests, Window
from api.main import create_app
from jobs import keys, workers
from jobs import lease as leases
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.lease import Outcome
from jobs.locks import run_lock
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import ApiKey, Job
from tests.api.local import Office, local_client
from tests.conftest import job_body

LOOKS = ["/v1/jobs", "/v1/jobs/job-x", "/v1/workers", "/v1/methods", "/metrics"]


@pytest.fixture
def office(settings: Settings, database: Database) -> Iterator[Office]:
    with Office(settings, database) as opened:
        yield opened


def post(client: TestClient, **changes: object) -> str:
    answer = client.post("/v1/jobs", json=job_body(**changes))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("path", LOOKS)
@pytest.mark.parametrize("key", [None, "", "sk-stiefel-x-y", "other", "sk-stiefel-"])
def test_without_a_valid_key_nothing_is_told(office: Office, path: str, key: str | None) -> None:
    answer = office.with_key(key).get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["x-should-retry"] == "false"


def test_whether_it_lives_is_told_to_everybody(office: Office) -> None:
    stranger = office.with_key(None)
    assert stranger.get("/healthz").status_code == 200
    assert stranger.get("/readyz").status_code == 200


def test_a_key_may_what_its_scopes_say(office: Office) -> None:
    reader, writer, admin = office.client(Scope.READ), office.client(Scope.WRITE), office.client(Scope.ADMIN)
    refused = reader.post("/v1/jobs", json=job_body())
    assert refused.status_code == 403
    assert "scope write; yours has read" in refused.json()["error"]["message"]
    assert reader.get("/v1/jobs").status_code == 200
    job = post(writer)
    assert writer.post("/v1/workers/w/drain").status_code == 403
    assert admin.post("/v1/workers/w/drain").status_code == 404  # allowed to ask; there is none
    assert admin.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"


def test_each_key_sees_its_own_jobs_and_nothing_of_others(office: Office) -> None:
    mine, other, admin = office.client(), office.client(), office.client(Scope.ADMIN)
    job = post(mine)
    for path in ("", "/events", "/metrics", "/checkpoints", "/logs"):
        assert mine.get(f"/v1/jobs/{job}{path}").status_code == 200, path
        assert other.get(f"/v1/jobs/{job}{path}").status_code == 404, path
        assert admin.get(f"/v1/jobs/{job}{path}").status_code == 200, path
    for operation in ("cancel", "pause", "resume"):
        assert other.post(f"/v1/jobs/{job}/{operation}").status_code == 404
    assert other.delete(f"/v1/jobs/{job}").status_code == 404
    assert [j["id"] for j in mine.get("/v1/jobs").json()["data"]] == [job]
    assert other.get("/v1/jobs").json()["data"] == []
    assert other.get(f"/v1/jobs?after={job}").status_code == 400
    assert [j["id"] for j in admin.get("/v1/jobs").json()["data"]] == [job]


def test_prometheus_sees_the_jobs_of_its_key(office: Office, database: Database) -> None:
    mine, other, admin = office.client(), office.client(), office.client(Scope.ADMIN)
    job = post(mine)
    leases.claim(database, office.settings, job, "w")
    assert job in mine.get("/metrics").text
    assert job not in other.get("/metrics").text
    assert job in admin.get("/metrics").text


def test_metrics_can_be_opened(settings: Settings, database: Database) -> None:
    with Office(settings.model_copy(update={"open_metrics": True}), database) as office:
        assert office.with_key(None).get("/metrics").status_code == 200
        assert office.with_key(None).get("/v1/jobs").status_code == 401


def test_a_revoked_key_is_refused_and_its_jobs_stay(office: Office, database: Database) -> None:
    key_id, key = office.key()
    job = post(office.with_key(key))
    keys.revoke(database, key_id)
    keys.revoke(database, key_id)
    assert office.with_key(key).get("/v1/jobs").status_code == 401
    assert office.client(Scope.ADMIN).get(f"/v1/jobs/{job}").json()["owner"] == key_id


def test_no_key_is_in_the_database(office: Office, database: Database) -> None:
    _, key = office.key()
    assert office.with_key(key).get("/v1/jobs").status_code == 200
    with database.reading() as session:
        row = session.scalars(select(ApiKey)).one()
        everything = str(session.execute(text("SELECT * FROM api_keys")).all())
    assert row.last_used_at is not None
    assert key.rpartition("-")[2] not in everything


def test_wrong_keys_cannot_be_tried_for_ever(settings: Settings, database: Database) -> None:
    with Office(settings.model_copy(update={"failed_keys_per_minute": 3}), database) as office:
        guesses = [office.with_key(f"sk-stiefel-x-{n}").get("/v1/jobs") for n in range(5)]
        # Who has a right key behind the same address is not shut out.
        assert office.client().get("/v1/jobs").status_code == 200
    assert [answer.status_code for answer in guesses] == [401, 401, 401, 429, 429]
    assert 1 <= int(guesses[-1].headers["retry-after"]) <= 60


def test_whoever_has_very_many_addresses_fills_no_memory(settings: Settings) -> None:
    window = Window(2, remembered=100)
    for number in range(1000):
        assert window.count(str(number)) is None
    assert len(window) == 100
    # Of IPv6 a whole /64 is one subscriber.
    rates = Rates(settings.model_copy(update={"failed_keys_per_minute": 2}))
    for number in range(2):
        rates.count_wrong_key(f"2001:db8::{number}")
    with pytest.raises(TooManyRequests):
        rates.count_wrong_key("2001:db8::ffff")
    rates.count_wrong_key("2001:db8:0:1::1")


def test_a_minute_is_any_minute() -> None:
    at = 1000.0
    window = Window(2, clock=lambda: at)
    assert window.count("a") is None
    at += 40
    assert window.count("a") is None
    at += 10
    assert window.count("a") == 10
    assert window.count("b") is None
    at += 10
    assert window.count("a") is None
    assert window.count("a") == 40


def test_more_requests_than_allowed_are_told_when_to_come_again(settings: Settings, database: Database) -> None:
    with Office(settings.model_copy(update={"requests_per_minute": 3}), database) as office:
        client, other = office.client(), office.client()
        answers = [client.get("/v1/jobs") for _ in range(4)]
        assert other.get("/v1/jobs").status_code == 200
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert "x-should-retry" not in answers[-1].headers  # a client that waits and tries again does right


# ------------------------------------------------------------------------------------------------ without API keys


@pytest.mark.parametrize(
    ("address", "host", "headers"),
    [
        ("192.0.2.7", "127.0.0.1", {}),
        ("127.0.0.1", "192.0.2.1", {}),
        ("127.0.0.1", "stiefel.example", {}),  # a name that somebody lets lead to 127.0.0.1
        ("127.0.0.1", "127.0.0.1", {"x-forwarded-for": "192.0.2.7"}),
        ("127.0.0.1", "127.0.0.1", {"forwarded": "for=192.0.2.7"}),
        ("127.0.0.1", "127.0.0.1", {"origin": "https://page.example"}),  # a page that this machine's browser shows
        ("127.0.0.1", "127.0.0.1", {"origin": "null"}),
        ("127.0.0.1", "127.0.0.1", {"sec-fetch-site": "cross-site"}),
    ],
)
def test_without_keys_only_this_machine_is_answered(
    settings: Settings, database: Database, address: str, host: str, headers: dict[str, str]
) -> None:
    app = create_app(settings)
    with TestClient(app, base_url=f"http://{host}", client=(address, 1), headers=headers) as client:
        for path in LOOKS:
            answer = client.get(path)
            assert answer.status_code == 403, path
            assert "STIEFEL_AUTH=on" in answer.json()["error"]["message"]
        assert client.post("/v1/jobs", json=job_body()).status_code == 403


def test_the_api_s_own_page_may_ask(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        headers = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
        assert client.post("/v1/jobs", json=job_body(), headers=headers).status_code == 201
        # What a page of the web can send without its browser asking first.
        plain = {"content-type": "text/plain"}
        assert client.post("/v1/jobs", content=json.dumps(job_body()), headers=plain).status_code == 400


# ------------------------------------------------------------------------------------------------------------ quotas


def test_a_key_may_have_so_many_jobs_queued(office: Office) -> None:
    client = office.client(quotas=Quotas(queued=2))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=job_body()), range(6)))
    assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert "2 of 2" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    client.post(f"/v1/jobs/{client.get('/v1/jobs').json()['data'][0]['id']}/cancel")
    post(client)


def test_a_key_may_have_so_many_jobs_running_however_many_workers_ask_at_once(
    office: Office, database: Database
) -> None:
    client = office.client(quotas=Quotas(running=2))
    jobs = [post(client) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        won = list(pool.map(lambda job: leases.claim(database, office.settings, job, f"w-{job}"), jobs))
    held = [lease for lease in won if lease is not None]
    assert len(held) == 2
    waits = next(job for job, lease in zip(jobs, won, strict=True) if lease is None)
    workers.seen(database, workers.Card("w", "host", "0", (), 4))
    assert "as many jobs running as it may" in client.get(f"/v1/jobs/{waits}").json()["scheduling"]["reason"]
    leases.finish(database, office.settings, held[0], Outcome("succeeded", 0))
    assert leases.claim(database, office.settings, waits, "w") is not None


def test_device_hours_are_counted_and_end_a_job_with_a_checkpoint_when_used_up(
    office: Office, database: Database
) -> None:
    key_id, key = office.key(quotas=Quotas(device_hours=1.0))
    client = office.with_key(key)
    job = post(client, resources={"processes": 2}, optimisation={"global_batch": 4})
    lease = leases.claim(database, office.settings, job, "w")
    assert lease is not None
    assert not leases.beat(database, office.settings, lease).pause
    with database.transaction() as session:  # as if the last beat had been 31 minutes ago: 2 devices, 62 minutes
        session.execute(update(Job).values(charged_until=Job.charged_until - 31 * 60))
    assert leases.beat(database, office.settings, lease).pause
    assert leases.finish(database, office.settings, lease, Outcome("stopped", 0)) == State.PAUSED
    with database.reading() as session:
        assert session.get_one(ApiKey, key_id).device_seconds == pytest.approx(62 * 60, abs=5)
    assert client.get(f"/v1/jobs/{job}").json()["usage"]["device_seconds"] == pytest.approx(62 * 60, abs=5)
    events = client.get(f"/v1/jobs/{job}/events").json()["data"]
    assert any("device hours are used up" in str(event["data"]) for event in events)
    for refused in (client.post("/v1/jobs", json=job_body()), client.post(f"/v1/jobs/{job}/resume")):
        assert refused.status_code == 429
        assert "device hours" in refused.json()["error"]["message"]


def test_storage_is_limited_and_deleting_an_ended_job_frees_it(office: Office, database: Database) -> None:
    client = office.client(quotas=Quotas(storage_bytes=1000))
    job = post(client)
    lease = leases.claim(database, office.settings, job, "w")
    assert lease is not None
    leases.measured(database, lease, 1500)
    refused = client.post("/v1/jobs", json=job_body())
    assert refused.status_code == 429
    assert "1,500 of 1,000" in refused.json()["error"]["message"]
    assert client.delete(f"/v1/jobs/{job}").status_code == 409  # it runs
    leases.finish(database, office.settings, lease, Outcome("succeeded", 0))
    run = office.settings.runs / job
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("x")

    trainer = run_lock(str(run))
    assert trainer.try_acquire()  # one that outlived its worker
    in_use = client.delete(f"/v1/jobs/{job}")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "files_in_use")
    trainer.release()
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    assert not run.exists()
    assert client.get(f"/v1/jobs/{job}").status_code == 404
    assert client.delete(f"/v1/jobs/{job}").status_code == 404
    post(client)
