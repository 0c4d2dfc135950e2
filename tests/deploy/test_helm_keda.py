"""The question that KEDA asks of the database, on a real PostgreSQL with the service's own tables."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text, update

from jobs import keys, schedule, submission, workers
from jobs import lease as leases
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import ApiKey, Job
from jobs.workers import Card
from migrations.__main__ import upgrade
from tests.conftest import job_body
from tests.deploy.chart import component, containers, environment, objects, of_kind, rendered, template
from trainer.process import free_port

POOLS = {
    "gpu8": Card("gpu8:pod-1", "pod-1", "0", tuple("01234567"), 8),
    "gpu": Card("gpu:pod-1", "pod-1", "0", ("0",), 1),
    "cpu": Card("cpu:pod-1", "pod-1", "0", (), 2),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each pool, as KEDA would get it."""
    values = tmp_path_factory.mktemp("keda") / "values.yaml"
    values.write_text(
        """
        database: {host: postgresql, existingSecret: s}
        broker: {host: redis}
        workers:
          - {name: gpu8, scaling: keda, gpus: 8}
          - {name: gpu, scaling: keda, gpus: 1}
          - {name: cpu, scaling: keda, gpus: 0, cpuSlots: 2}
        """
    )
    done = template(values)
    assert done.returncode == 0, done.stderr
    found = {}
    for scaled in of_kind(objects(done.stdout), "ScaledJob"):
        [trigger] = scaled["spec"]["triggers"]
        found[scaled["metadata"]["labels"]["stiefel-pool"]] = trigger["metadata"]["query"]
    return found


@pytest.fixture
def settings(tmp_path: Path, postgresql: Callable[[], str]) -> Settings:
    broker = f"redis://127.0.0.1:{free_port()}/0"
    return Settings(home=tmp_path, database_url=postgresql(), redis_url=broker, lease_seconds=30)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    upgrade(settings.url)
    opened = Database(settings.url)
    yield opened
    opened.close()


@pytest.fixture
def wanted(database: Database, questions: dict[str, str]) -> Callable[[], dict[str, int]]:
    def ask() -> dict[str, int]:
        with database.reading() as session:
            return {pool: session.execute(text(query)).scalar_one() for pool, query in questions.items()}

    return ask


def submit(database: Database, settings: Settings, devices: int, device: str = "any", owner: str = "") -> Job:
    body = job_body(resources={"processes": devices, "device": device}, optimisation={"global_batch": 8})
    return submission.create(database, settings, JobRequest.model_validate(body), owner)


def claim(database: Database, settings: Settings, job: Job, card: Card) -> None:
    workers.seen(database, card)
    assert leases.claim(database, settings, job.id, card.name) is not None


def test_nothing_waits_nothing_is_wanted(wanted: Callable[[], dict[str, int]]) -> None:
    assert wanted() == {"gpu8": 0, "gpu": 0, "cpu": 0}


def test_jobs_that_fit_count_as_the_scheduler_has_it(
    database: Database, settings: Settings, wanted: Callable[[], dict[str, int]]
) -> None:
    for devices, device in ((1, "any"), (2, "any"), (1, "gpu"), (8, "gpu"), (1, "cpu"), (2, "cpu"), (4, "cpu")):
        submit(database, settings, devices, device)
    later = submit(database, settings, 1)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == later.id).values(not_before=1e12))
    assert wanted() == {"gpu8": 4, "gpu": 2, "cpu": 4}
    assert wanted() == {pool: len(schedule.candidates(database, card)) for pool, card in POOLS.items()}


def test_a_claim_changes_nothing_for_the_pool_that_has_it(
    database: Database, settings: Settings, wanted: Callable[[], dict[str, int]]
) -> None:
    """KEDA starts (wanted − Jobs that have not ended): a worker that was just started must not be started again."""
    job, _ = submit(database, settings, 1, "gpu"), submit(database, settings, 1, "gpu")
    assert wanted() == {"gpu8": 2, "gpu": 2, "cpu": 0}
    claim(database, settings, job, POOLS["gpu"])
    # The other pool, whose name begins alike, has one fewer to think of.
    assert wanted() == {"gpu8": 1, "gpu": 2, "cpu": 0}


def test_no_worker_is_wanted_for_jobs_whose_owner_is_at_a_limit(
    database: Database, settings: Settings, wanted: Callable[[], dict[str, int]]
) -> None:
    def owner(quotas: Quotas) -> str:
        return keys.create(database, "o", [Scope.WRITE], quotas)[0].id

    two, spent, free = owner(Quotas(running=2)), owner(Quotas(device_hours=1)), owner(Quotas())
    for who in (two, spent, free):
        for _ in range(3):
            submit(database, settings, 1, "gpu", who)
    with database.transaction() as session:
        session.execute(update(ApiKey).where(ApiKey.id == spent).values(device_seconds=3600))
    assert wanted()["gpu"] == 2 + 0 + 3
    [mine, *_] = [job for job in schedule.candidates(database, POOLS["gpu"]) if job.owner == two]
    claim(database, settings, mine, POOLS["gpu"])
    # One that runs, one more that may, three of the others.
    assert wanted() == {"gpu8": 4, "gpu": 5, "cpu": 0}


def test_a_worker_of_a_pool_has_the_name_that_the_question_looks_for() -> None:
    parts = rendered("everything")
    [scaled] = of_kind(parts, "ScaledJob")
    [container] = containers(scaled["spec"]["jobTargetRef"]["template"])
    assert environment(container, parts)["STIEFEL_WORKER"] == "h100:$(POD_NAME)"
    [trigger] = scaled["spec"]["triggers"]
    assert "worker LIKE 'h100:%'" in trigger["metadata"]["query"]


def test_keda_finds_the_database_and_its_password() -> None:
    for case, host in {"everything": "training-postgresql.ml.svc", "keda": "postgresql.example.com"}.items():
        parts = rendered(case)
        [authentication] = of_kind(parts, "TriggerAuthentication")
        [password] = authentication["spec"]["secretTargetRef"]
        for scaled in of_kind(parts, "ScaledJob"):
            pod = scaled["spec"]["jobTargetRef"]["template"]
            [trigger] = scaled["spec"]["triggers"]
            assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
            about = trigger["metadata"]
            assert (about["host"], about["port"], about["dbName"], about["userName"]) == (
                host,
                "5432",
                "stiefel",
                "stiefel",
            )
            told = environment(containers(pod)[0], parts)["PGPASSWORD"]["secretKeyRef"]
            assert password == {"parameter": "password"} | told


def test_a_scaled_job_ends_no_training_and_repeats_none() -> None:
    for scaled in of_kind(rendered("keda"), "ScaledJob"):
        spec = scaled["spec"]
        assert spec["rollout"] == {"strategy": "gradual"}
        # The question counts those that run too: this strategy takes them off again.
        assert spec["scalingStrategy"] == {"strategy": "default"}
        job = spec["jobTargetRef"]
        assert job["backoffLimit"] == 0
        assert "activeDeadlineSeconds" not in job
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        [container] = containers(job["template"])
        assert container["args"] == ["python", "-m", "worker", "--once"]
        assert component(job["template"]["metadata"]["labels"]) == "worker"
