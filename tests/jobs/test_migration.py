"""Jobs survive a change of the schema, up and down, on SQLite and on PostgreSQL."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text

from jobs import keys, store, submission, workers
from jobs import lease as leases
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import Base
from jobs.workers import Card
from migrations.__main__ import configuration, upgrade
from tests.conftest import job_body
from tests.jobs.test_lease import record, started, step
from trainer import events
from trainer.config import TrainingSpec

# What the first schema's version stored.
OLD = {
    "model": {"preset": "llama-tiny"},
    "dataset": {"source": "python-stdlib"},
    "method": {"name": "full"},
    "optimisation": {"steps": 100, "checkpoint_every": 7, "keep_checkpoints": 3},
    "resources": {"processes": 2},
}
REVISIONS = [script.revision for script in ScriptDirectory.from_config(configuration("")).walk_revisions()][::-1]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    yield made
    made.dispose()


def test_a_job_of_the_first_version_can_be_trained_by_this_one_and_goes_back(
    database_url: str, settings: Settings, engine: Engine
) -> None:
    command.upgrade(configuration(database_url), "0001")
    columns = {
        "id": "job", "metadata": "{}", "method": "full", "state": "queued", "created_at": 0, "queued_at": 0,
        "not_before": 0, "fence": 0, "failures": 0, "max_attempts": 3, "step": 0, "steps": 100, "figures": "{}",
        "events_offset": 0, "run_directory": "/runs/job", "spec": json.dumps(OLD),
    }  # fmt: skip
    with engine.begin() as connection:
        names = ", ".join(columns)
        connection.execute(text(f"INSERT INTO jobs ({names}) VALUES (:{', :'.join(columns)})"), columns)
        connection.execute(text("INSERT INTO workers (name, gpus, seen_at) VALUES ('w', '0,1', 5)"))

    upgrade(database_url)
    database = Database(database_url)
    job = store.get(database, "job")
    wanted = TrainingSpec.model_validate(job.spec).checkpoints
    assert (wanted.every, wanted.keep, wanted.keep_best) == (7, 3, True)
    assert (job.owner, job.priority, job.device, job.devices) == ("", 0, "any", 2)
    assert job.retry_on == ["infrastructure", "killed", "unknown"]
    assert leases.claim(database, settings, "job", "w") is not None
    database.close()

    command.downgrade(configuration(database_url), "0001")
    with engine.connect() as connection:
        spec = connection.execute(text("SELECT spec FROM jobs")).scalar_one()
    assert (spec if isinstance(spec, dict) else json.loads(spec)) == OLD


def test_every_step_down_and_up_keeps_the_rows(database: Database, settings: Settings, engine: Engine) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    owner = keys.create(database, "somebody", [Scope.WRITE], Quotas(queued=5))[0].id
    workers.seen(database, Card("w", "host", "0", ("0",), 1))
    ids = []
    for number in range(3):
        request = JobRequest.model_validate(job_body(name=str(number)))
        ids.append(submission.create(database, settings, request, owner, f"key-{number}").id)
    lease = leases.claim(database, settings, ids[0], "w")
    assert lease is not None
    saved = events.Checkpointed(step=2, path="/c", bytes=1, seconds=1.0)
    evaluated = events.Evaluated(step=2, loss=1.0, perplexity=2.7, sequences=1, seconds=1.0)
    record(database, lease, [started(0), step(1, 1.0), step(2, 2.0), evaluated, saved], 10)
    before = rows(engine)
    assert all(before[table] for table in ("jobs", "attempts", "points", "events", "workers", "api_keys", "outbox"))

    for revision in reversed(REVISIONS[:-1]):
        command.downgrade(configuration(url), revision)
        kept = rows(engine)
        assert {table: before[table] for table in kept} == kept, f"down to {revision}"
    for revision in REVISIONS[1:]:
        command.upgrade(configuration(url), revision)
    # What only the newest schema knows is gone; everything else is as it was.
    assert rows(engine) == before | {"api_keys": 0}
    again = store.get(database, ids[0])
    assert (again.state, again.fence, again.devices, again.retry_on) == ("running", 1, 1, list(again.retry_on))
    assert [p.step for p in store.points(database, ids[0]).items] == [1, 2]

    command.downgrade(configuration(url), "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}


def test_events_of_before_are_placed_among_their_steps_by_their_times(
    database: Database, settings: Settings, engine: Engine
) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    job = submission.create(database, settings, JobRequest.model_validate(job_body()))
    lease = leases.claim(database, settings, job.id, "w")
    assert lease is not None
    told = [step(number, 1.0).model_copy(update={"at": at}) for number, at in ((1, 10.0), (2, 30.0), (4, 20.0))]
    record(database, lease, [started(0), *told], 10)
    times = {"queued": 1.0, "claimed": 15.0, "started": 12.0}
    with engine.begin() as connection:
        for kind, at in times.items():
            connection.execute(text("UPDATE events SET at = :at WHERE type = :type"), {"at": at, "type": kind})
        late = "INSERT INTO events (job_id, at, type, data) VALUES (:job, 35, 'late', '{}')"
        connection.execute(text(late), {"job": job.id})
    command.downgrade(configuration(url), "0005")
    command.upgrade(configuration(url), "0006")
    with engine.connect() as connection:
        found = dict(connection.execute(text("SELECT type, reached FROM events")).all())
    # The clock went back between claimed and started, and between steps 2 and 4; the order of storing did not.
    assert found == {"queued": 0, "claimed": 1, "started": 1, "late": 4}


def rows(engine: Engine) -> dict[str, int]:
    """How many rows each table has, of the tables that there are."""
    there = set(inspect(engine).get_table_names()) & set(Base.metadata.tables)
    with engine.connect() as connection:
        return {
            table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608
            for table in there
        }


def test_a_database_that_is_newer_than_this_version_is_refused_with_the_way_back(
    database_url: str, engine: Engine
) -> None:
    upgrade(database_url)
    assert migrations(database_url, "--down-to", "0003") == (0, "the database has schema 0003\n", "")
    code, _, error = migrations(database_url, "--down-to", "0004")
    assert (code, error.splitlines()[-1].endswith("has schema 0003, from which that is not down")) == (1, True)
    code, _, error = migrations(database_url, "--down-to", "0000")
    assert code == 1
    assert f"--down-to 0000: no such schema; there are {', '.join(REVISIONS)}" in error

    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    code, _, error = migrations(database_url)
    assert code == 1
    assert f"with python -m migrations --down-to {REVISIONS[-1]}" in error


def test_several_that_migrate_at_once_wait_for_one_another(database_url: str, engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite is for one machine, whose stack migrates once")
    with ThreadPoolExecutor(4) as pool:
        codes = [code for code, _, _ in pool.map(migrations, [database_url] * 4)]
    assert codes == [0, 0, 0, 0]
    assert "jobs" in inspect(engine).get_table_names()


def migrations(url: str, *arguments: str) -> tuple[int, str, str]:
    """The command as a process: exit code, what it says, what it complains of."""
    environment = os.environ | {"STIEFEL_DATABASE_URL": url, "STIEFEL_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "migrations", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
