"""Backup and restore as docs/operations.md has them: saved while a job trains, wiped, restored, gone on with.

The database first, the run directories after it. Files of another age than the database's are tested too, because
snapshots of volumes have schedules of their own, and so is another place for them.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs import keys
from jobs.database import Database
from jobs.keys import Quotas, Scope
from tests.conftest import job_body
from tests.system.conftest import Curve
from tests.system.postgresql import Postgresql
from tests.system.processes import kill, tree
from tests.system.service import Service, running
from trainer.checkpoint.place import Directory
from trainer.checkpoint.reading import read

STEPS, EVERY = 400, 40
JOB: dict[str, Any] = {
    "optimisation": {"steps": STEPS, "evaluate_every": STEPS},
    "checkpoints": {"every": EVERY, "keep": 2, "keep_best": False},
}
IDS = ("done", "paused", "training", "queued")
AFTER = "after-the-dump"


@dataclass
class Backup:
    """All that is left of a service, and what its clients remember of it.

    `files`: tar files of the run directories, made before the database was dumped (`older`), right after it, and when
    the job that trained had ended (`newer`).
    """

    home: Path
    directory: Path
    key: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    curve: Curve = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)  # that the dump knows of the job that trained

    @property
    def dump(self) -> Path:
        return self.directory / "stiefel.dump"


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Backup:
    """Of one job that has ended, one that is paused, one that trains, and one that waits for the only worker."""
    made = Backup(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("backup"))
    with Postgresql() as server:
        with running(made.home, STIEFEL_DATABASE_URL=server.url, STIEFEL_AUTH="on") as service:
            made.key = new_key(server)
            service.http.headers["authorization"] = f"Bearer {made.key}"
            made.ids["done"] = submit(service, "done")
            service.wait(made.ids["done"], "succeeded")
            made.curve = service.curve(made.ids["done"])
            made.ids["paused"] = submit(service, "paused")
            service.wait_for_step(made.ids["paused"], 2 * EVERY + 5)
            service.http.post(f"/v1/jobs/{made.ids['paused']}/pause")
            service.wait(made.ids["paused"], "paused")
            made.ids["training"] = submit(service, "training")
            made.ids["queued"] = submit(service, "queued")
            save_while_it_trains(service, server, made)
            cut_power(service)
        kill(server.processes)
    shutil.rmtree(made.home)
    return made


def save_while_it_trains(service: Service, server: Postgresql, made: Backup) -> None:
    training = made.ids["training"]
    service.wait_for_step(training, EVERY + 5)
    made.files["older"] = copy_files(made, "older")
    # So long that none of the checkpoints in there is kept.
    service.wait_for_step(training, service.reported(training) + 3 * EVERY)
    made.checkpoints = checkpoints(service, training)
    server.tool("pg_dump", "--format", "custom", "--file", str(made.dump))
    submit(service, AFTER)
    dumped = service.reported(training)
    service.until(lambda: service.reported(training) > dumped, "a step that the dump does not know")
    made.files["right after"] = copy_files(made, "right after")
    assert service.reported(training) < STEPS, "it was not to end meanwhile"
    service.wait(training, "succeeded")
    made.files["newer"] = copy_files(made, "newer")


def copy_files(made: Backup, name: str) -> Path:
    """Hard links first: a moment, in which hardly a checkpoint is removed; then, at leisure, the files."""
    file, links = made.directory / f"{name}.tar", made.home / "backup"
    subprocess.run(["cp", "-al", str(made.home / "runs"), str(links)], check=False)
    archived = subprocess.run(["tar", "-C", str(links), "-cf", str(file), "."], check=False)
    # 1: a file has grown meanwhile.
    assert archived.returncode in (0, 1)
    shutil.rmtree(links)
    return file


@contextmanager
def restored(made: Backup, files: str | None, home: Path | None = None) -> Iterator[Service]:
    """A service on a new database server, a new broker, and restored files, where the old ones were or in `home`."""
    home = home or made.home
    (home / "runs").mkdir(parents=True)
    if files is not None:
        subprocess.run(["tar", "-C", str(home / "runs"), "-xf", str(made.files[files])], check=True)
    with Postgresql() as server:
        server.tool("pg_restore", "--no-owner", "--exit-on-error", str(made.dump))
        if home != made.home:
            server.tool("psql", "--command", f"UPDATE jobs SET run_directory = '{home}/runs/' || id")
        with running(home, STIEFEL_DATABASE_URL=server.url, STIEFEL_AUTH="on") as service:
            service.http.headers["authorization"] = f"Bearer {made.key}"
            yield service
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def service(backup: Backup) -> Iterator[Service]:
    """Restored as documented: files from right after the dump, and a broker that is new and empty."""
    with restored(backup, "right after") as started:
        yield started


def test_a_job_that_was_training_goes_on_from_its_newest_checkpoint(service: Service, backup: Backup) -> None:
    training = backup.ids["training"]
    service.wait(training, "succeeded")
    assert service.outcomes(training) == ["lost", "succeeded"]
    assert service.curve(training) == backup.curve
    assert starts(service, training)[-1] >= max(backup.checkpoints)


def test_a_job_that_was_queued_runs(service: Service, backup: Backup) -> None:
    queued = backup.ids["queued"]
    service.wait(queued, "succeeded")
    assert service.outcomes(queued) == ["succeeded"]
    assert service.curve(queued) == backup.curve


def test_a_job_that_was_paused_stays_so_and_can_be_resumed(service: Service, backup: Backup) -> None:
    paused = backup.ids["paused"]
    # The tests before have waited for two jobs to run meanwhile.
    assert service.job(paused)["state"] == "paused"
    service.http.post(f"/v1/jobs/{paused}/resume")
    service.wait(paused, "succeeded")
    assert service.curve(paused) == backup.curve
    assert starts(service, paused)[-1] >= 2 * EVERY


def test_a_job_that_had_ended_can_be_read_and_its_checkpoints_are_whole(service: Service, backup: Backup) -> None:
    done = backup.ids["done"]
    assert service.job(done)["state"] == "succeeded"
    assert service.curve(done) == backup.curve
    assert [event["type"] for event in events(service, done)][-2:] == ["finished", "succeeded"]
    assert service.http.get(f"/v1/jobs/{done}/logs").json()["text"]
    place = Directory(service.rundir(done).checkpoints)
    # With their checksums.
    assert [read(place, step).step for step in checkpoints(service, done)] == [STEPS - EVERY, STEPS]


def test_what_was_submitted_after_the_dump_is_gone_and_may_be_sent_again(service: Service, backup: Backup) -> None:
    names = {job["name"] for job in service.http.get("/v1/jobs").json()["data"]}
    assert names == set(IDS)
    again = submit(service, AFTER)
    assert again not in backup.ids.values()
    service.http.post(f"/v1/jobs/{again}/cancel")
    # What the dump knows is not doubled.
    assert submit(service, "queued") == backup.ids["queued"]


def test_api_keys_are_those_of_the_dump(service: Service, backup: Backup) -> None:
    assert service.http.get("/v1/jobs").status_code == 200
    for wrong in ("", f"Bearer {backup.key[:-1]}"):
        assert service.http.get("/v1/jobs", headers={"authorization": wrong}).status_code == 401


@pytest.mark.parametrize("files", ["older", "newer"])
def test_files_of_another_age_than_the_database_cost_no_point_of_the_curve(
    backup: Backup, files: str, tmp_path: Path
) -> None:
    """Older: rows of checkpoints that are not there. Newer: the job has ended, and the database does not know."""
    with restored(backup, files, home=tmp_path / "elsewhere") as elsewhere:
        training = backup.ids["training"]
        place = Directory(elsewhere.rundir(training).checkpoints)
        present = place.complete_steps()
        assert max(present) < min(backup.checkpoints) if files == "older" else max(present) == STEPS
        see_through(elsewhere, backup)
        assert starts(elsewhere, training)[-1] == max(present)
        assert checkpoints(elsewhere, training) == place.complete_steps() == [STEPS - EVERY, STEPS]


def test_a_job_without_its_files_starts_from_the_beginning(backup: Backup, tmp_path: Path) -> None:
    with restored(backup, None, home=tmp_path / "elsewhere") as elsewhere:
        see_through(elsewhere, backup)
        training = backup.ids["training"]
        assert starts(elsewhere, training)[-1] == 0
        assert checkpoints(elsewhere, training) == [STEPS - EVERY, STEPS]


def see_through(service: Service, backup: Backup) -> None:
    """The job that trained, and no other."""
    service.http.post(f"/v1/jobs/{backup.ids['queued']}/cancel")
    service.wait(backup.ids["training"], "succeeded")
    assert service.curve(backup.ids["training"]) == backup.curve


def new_key(server: Postgresql) -> str:
    database = Database(server.url)
    _, key = keys.create(database, "team", [Scope.WRITE], Quotas())
    database.close()
    return key


def submit(service: Service, name: str) -> str:
    """The id of the job of this name, whether it was there or not."""
    answer = service.http.post("/v1/jobs", json=job_body(name=name, **JOB), headers={"idempotency-key": name})
    assert answer.is_success, answer.text
    return str(answer.json()["id"])


def checkpoints(service: Service, job_id: str) -> list[int]:
    """Those that the API says are kept."""
    rows = service.http.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    return sorted(row["step"] for row in rows if row["kept"])


def starts(service: Service, job_id: str) -> list[int]:
    """The step that each attempt has started from."""
    return [event["step"] for event in events(service, job_id) if event["type"] == "started"]


def events(service: Service, job_id: str) -> list[dict[str, Any]]:
    return list(service.http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"])


def cut_power(service: Service) -> None:
    kill(process for name in service.stack.children for process in tree(service.stack.pid(name)))
