"""A POST that is sent again makes no second job. On SQLite and on PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.database import Database
from jobs.settings import Settings
from tests.api.local import Office, local_client
from tests.conftest import job_body

KEY = {"Idempotency-Key": "a-key"}


def test_the_same_key_gives_the_same_job(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        first = client.post("/v1/jobs", json=job_body(), headers=KEY)
        assert "idempotent-replayed" not in first.headers
        # Other words for the same wish: a default that is written out.
        again = client.post("/v1/jobs", json=job_body(deepspeed={"zero_stage": 2}), headers=KEY)
        assert (first.status_code, again.status_code) == (201, 201)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json() == first.json()
        client.post(f"/v1/jobs/{first.json()['id']}/cancel")
        assert client.post("/v1/jobs", json=job_body(), headers=KEY).json()["state"] == "cancelled"
        assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_many_at_once_make_one_job(settings: Settings, database: Database) -> None:
    with local_client(settings) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=job_body(), headers=KEY), range(8)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_key_with_another_body_is_refused(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        first = client.post("/v1/jobs", json=job_body(), headers=KEY).json()
        other = client.post("/v1/jobs", json=job_body(name="other"), headers=KEY)
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "idempotency_key_reused"
        assert first["id"] in other.json()["error"]["message"]
        assert other.headers["x-should-retry"] == "false"


def test_a_refused_request_may_be_repaired_under_the_same_key(settings: Settings, database: Database) -> None:
    with local_client(settings) as client:
        assert client.post("/v1/jobs", json=job_body(method={"rank": 0}), headers=KEY).status_code == 400
        assert client.post("/v1/jobs", json=job_body(), headers=KEY).status_code == 201


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "naïve"])
def test_an_odd_key_is_refused(settings: Settings, database: Database, key: str) -> None:
    with local_client(settings) as client:
        answer = client.post("/v1/jobs", json=job_body(), headers={"Idempotency-Key": key.encode("latin-1")})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "idempotency-key"


def test_keys_of_two_owners_do_not_meet(settings: Settings, database: Database) -> None:
    with Office(settings, database) as office:
        ids = {office.client().post("/v1/jobs", json=job_body(), headers=KEY).json()["id"] for _ in range(2)}
    assert len(ids) == 2
