"""Files through their lives, with processes that die in the middle; in a directory and in a real S3 store."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from jobs import examiner, filecheck, files, filestore, keys, lease, submission, wishes
from jobs.database import Database, now
from jobs.errors import FileDamaged, FileNeeded, FileUnknown, QuotaExceeded, StoreAway
from jobs.filecheck import Checker, check
from jobs.files import NewFile, Status
from jobs.filestore import Incoming
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import JobFile, StoredFile
from tests.api.forms import CHAT, lines
from tests.conftest import job_body
from tests.s3 import S3

CONTENT = lines(CHAT, CHAT)
RUNNING = threading.Event()  # never set: the process goes on


def stored(
    database: Database, settings: Settings, content: bytes = CONTENT, name: str = "x.jsonl", **new: Any
) -> StoredFile:
    with Incoming(settings) as incoming:
        incoming.write(content)
        return files.create(
            database, settings, NewFile(**{"owner": "", "purpose": "fine-tune", "filename": name} | new), incoming
        )


def job(database: Database, settings: Settings) -> str:
    return submission.create(database, settings, JobRequest.model_validate(job_body())).id


def needing(database: Database, settings: Settings, *file_ids: str) -> str:
    job_id = job(database, settings)
    with database.transaction() as session:
        files.need(session, job_id, file_ids, None)
    return job_id


def change(database: Database, file: StoredFile, **values: Any) -> None:
    with database.transaction() as session:
        session.execute(update(StoredFile).where(StoredFile.id == file.id).values(**values))


def rows(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(StoredFile.status)))


def on_disk(settings: Settings) -> list[Path]:
    return [path for path in settings.files.rglob("*") if path.is_file()]


def test_an_expired_file_goes_unless_a_job_needs_it(database: Database, settings: Settings) -> None:
    needed, other, later = (stored(database, settings, expires_after=3600) for _ in range(3))
    job_id = needing(database, settings, needed.id)
    assert files.remove_due(database, settings) == 0
    for file in (needed, other):
        change(database, file, expires_at=now() - 1)
    assert files.remove_due(database, settings) == 1
    assert {file.id for file in files.list_files(database).items} == {needed.id, later.id}
    wishes.cancel(database, settings, job_id)
    assert files.remove_due(database, settings) == 1
    assert files.get(database, later.id).expires_at == later.created_at + 3600
    assert len(on_disk(settings)) == 1


def test_a_running_job_keeps_its_file_and_one_that_has_ended_does_not(database: Database, settings: Settings) -> None:
    file = stored(database, settings)
    job_id = needing(database, settings, file.id, file.id)
    assert lease.claim(database, settings, job_id, "w") is not None
    with pytest.raises(FileNeeded, match=job_id):
        files.remove(database, settings, file.id)
    # Held back it is no worse for it.
    assert filestore.ensure_local(settings, files.get(database, file.id)).read_bytes() == CONTENT
    with database.reading() as session:
        assert session.scalars(select(JobFile.file_id)).all() == [file.id]


def test_a_file_that_goes_cannot_be_needed_any_more(database: Database, settings: Settings) -> None:
    """Whoever is first: the row is held by both."""
    file = stored(database, settings)
    outcomes: list[type[Exception] | None] = []

    def attempt(what: Any) -> None:
        try:
            what()
            outcomes.append(None)
        except (FileUnknown, FileNeeded) as error:
            outcomes.append(type(error))

    job_id = job(database, settings)

    def need() -> None:
        with database.transaction() as session:
            files.need(session, job_id, [file.id], None)

    both = [lambda: files.remove(database, settings, file.id), need]
    threads = [threading.Thread(target=attempt, args=[what]) for what in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) in ([FileNeeded, None], [FileUnknown, None])


def test_what_a_dead_process_has_begun_to_store_is_removed(database: Database, settings: Settings) -> None:
    file = stored(database, settings)
    change(database, file, status=Status.STORING, checked_until=now() + 10)
    assert files.remove_due(database, settings) == 0
    assert files.list_files(database).items == []
    with pytest.raises(FileUnknown):
        files.get(database, file.id)
    change(database, file, checked_until=now() - 1)
    assert files.remove_due(database, settings) == 1
    assert (rows(database), on_disk(settings)) == ([], [])


def test_what_a_dead_process_has_half_received_is_removed(settings: Settings) -> None:
    fresh, stale = Incoming(settings), Incoming(settings)
    for incoming in (fresh, stale):
        incoming.write(b"half")
        incoming.close()
    os.utime(stale.path, (0, 0))
    filestore.sweep(settings)
    assert on_disk(settings) == [fresh.path]


def test_a_store_that_takes_nothing_leaves_nothing(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filestore.durable, "sync", full)
    with pytest.raises(StoreAway, match=r"cannot be written at the moment: OSError: .*No space left"):
        stored(database, settings)
    monkeypatch.undo()
    assert files.list_files(database).items == []
    assert files.remove_due(database, settings) == 1
    assert (rows(database), on_disk(settings)) == ([], [])


def test_a_file_counts_while_it_is_stored(database: Database, settings: Settings) -> None:
    key, _ = keys.create(database, "k", [Scope.WRITE], Quotas(storage_bytes=2 * len(CONTENT)))
    change(database, stored(database, settings, owner=key.id), status=Status.STORING)
    stored(database, settings, owner=key.id)
    with pytest.raises(QuotaExceeded, match="storage bytes"):
        stored(database, settings, owner=key.id)
    with pytest.raises(QuotaExceeded), database.transaction() as session:
        keys.check_resources(session, key.id)


def test_a_damaged_file_is_told_and_not_used(database: Database, settings: Settings) -> None:
    file = stored(database, settings)
    path = filestore.local_path(settings, file)
    path.write_bytes(CONTENT.replace(b"larch", b"birch"))
    with pytest.raises(FileDamaged, match="SHA-256"):
        filestore.ensure_local(settings, file)
    checked = check(database, settings, file.id, RUNNING)
    assert checked is not None
    assert (checked.status, "SHA-256" in (checked.status_details or "")) == (Status.ERROR, True)
    path.unlink()
    with pytest.raises(FileDamaged, match="not there"):
        list(filestore.pieces(settings, file))


def test_a_file_is_examined_once(database: Database, settings: Settings) -> None:
    file = stored(database, settings)
    change(database, file, checked_until=now() + 60)
    assert check(database, settings, file.id, RUNNING) is None
    change(database, file, checked_until=now() - 1)
    checked = check(database, settings, file.id, RUNNING)
    assert checked is not None
    assert (checked.status, checked.examples, checked.format, checked.checked_until) == ("processed", 2, "chat", None)
    assert check(database, settings, file.id, RUNNING) is None


def test_who_has_lost_a_file_says_nothing_of_it(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stored(database, settings)

    def taken(*_: Any) -> dict[str, Any]:
        change(database, file, checked_until=now() + 100)
        return {"fine": True, "summary": "", "format": "chat", "examples": 1, "statistics": {}}

    monkeypatch.setattr(examiner, "examined", taken)
    assert check(database, settings, file.id, RUNNING) is None
    assert files.get(database, file.id).status == Status.UPLOADED


def test_a_file_whose_examiner_died_is_taken_up(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filecheck, "_FORGOTTEN_SECONDS", -1.0)
    file = stored(database, settings)
    checker = Checker(database, settings)
    checker.catch_up()
    checker._pool.shutdown()
    assert files.get(database, file.id).status == Status.PROCESSED
    checker.close()


def test_an_examination_ends_with_its_process_and_leaves_the_file_to_others(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "_SMALL_BYTES", 0)
    monkeypatch.setattr(examiner, "_command", lambda *_: ["/bin/sleep", "100"])
    file, stop = stored(database, settings), threading.Event()
    stop.set()
    with pytest.raises(filecheck.Stopped):
        check(database, settings, file.id, stop)
    left = files.get(database, file.id)
    assert (left.status, left.checked_until) == (Status.UPLOADED, None)


@pytest.mark.parametrize("code", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "x = bytes(2 ** 40)"])
def test_a_file_that_kills_its_examiner_is_in_error(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(examiner, "_SMALL_BYTES", 0)
    monkeypatch.setattr(examiner, "_command", lambda *_: [sys.executable, "-c", code])
    checked = check(database, settings, stored(database, settings).id, RUNNING)
    assert checked is not None
    assert (checked.status, "split it into smaller ones" in (checked.status_details or "")) == (Status.ERROR, True)


def test_an_examiner_knows_no_secret_of_ours(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STIEFEL_DATABASE_URL", "postgresql://u:hush@h/d")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setattr(examiner, "_SMALL_BYTES", 0)
    report = "dict(fine=False, summary=str(os.environ), format=None, examples=0, statistics={})"
    code = f"import os, json; print(json.dumps({report}))"
    monkeypatch.setattr(examiner, "_command", lambda *_: [sys.executable, "-c", code])
    checked = check(database, settings, stored(database, settings).id, RUNNING)
    assert checked is not None
    assert "PATH" in (checked.status_details or "")
    assert "hush" not in (checked.status_details or "")


def test_results_are_files_as_well(database: Database, settings: Settings) -> None:
    file = stored(
        database, settings, b"step,loss\n", "step_metrics.csv", purpose=files.RESULTS, status=Status.PROCESSED
    )
    assert files.list_files(database, purpose=files.RESULTS).items[0].id == file.id
    assert b"".join(filestore.pieces(settings, file)) == b"step,loss\n"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("files")
        yield server
    server.kill()


@pytest.fixture
def remote(settings: Settings, s3: S3) -> Settings:
    return settings.model_copy(update={"files_url": f"s3://files/{settings.home.name}"})


def test_in_an_object_store_a_file_lives_as_in_a_directory(
    database: Database, remote: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filestore, "_PART", 5 * 2**20)
    large = b'{"text": "' + os.urandom(6 * 2**20).hex().encode() + b'"}\n'  # of several parts
    file = stored(database, remote, large)
    checked = check(database, remote, file.id, RUNNING)
    assert checked is not None
    assert checked.status == Status.PROCESSED, checked.status_details
    # Nobody needs a copy here any longer; a worker elsewhere fetches one, once.
    assert on_disk(remote) == []
    worker = remote.model_copy(update={"home": tmp_path / "worker"})
    assert filestore.ensure_local(worker, file).read_bytes() == large
    with monkeypatch.context() as patch:
        patch.setattr(filestore, "pieces", None)
        filestore.ensure_local(worker, file)
    assert b"".join(filestore.pieces(remote, file)) == large
    filestore.local_path(worker, file).write_bytes(b"something else")
    with pytest.raises(FileDamaged):
        filestore.ensure_local(worker, file)
    assert filestore.ensure_local(worker, file).read_bytes() == large
    files.remove(database, remote, file.id)
    assert rows(database) == []
    with pytest.raises(FileDamaged, match="not there"):
        next(filestore.pieces(remote, file))


def test_a_store_that_is_away_is_waited_for(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Settings) -> None:
        raise ConnectionError("nobody answers")

    remote = settings.model_copy(update={"files_url": f"memory://{settings.home.name}"})
    file = stored(database, remote)
    monkeypatch.setattr(filestore, "_store", away)
    with pytest.raises(StoreAway, match="cannot be read at the moment: ConnectionError: nobody answers"):
        next(filestore.pieces(remote, file))
    files.remove(database, remote, file.id)
    assert (files.list_files(database).items, rows(database)) == ([], [Status.DELETED])
    with pytest.raises(StoreAway):
        stored(database, remote)
    assert files.remove_due(database, remote) == 0
    monkeypatch.undo()
    assert files.remove_due(database, remote) == 2
    assert (rows(database), on_disk(remote)) == ([], [])


def test_a_copy_goes_with_its_file_and_when_nobody_asks_for_it(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    remote = settings.model_copy(update={"files_url": f"memory://{settings.home.name}"})
    worker = remote.model_copy(update={"home": tmp_path / "worker"})
    used, needed, unused, deleted = (stored(database, remote) for _ in range(4))
    copies = [filestore.ensure_local(worker, file) for file in (used, needed, unused, deleted)]
    for copy in copies[:3]:
        os.utime(copy.parent, (0, 0))
    filestore.ensure_local(worker, used)
    job_id = needing(database, settings, needed.id)
    files.remove(database, remote, deleted.id)
    files.forget_copies(database, worker)
    assert {*on_disk(worker)} == {*copies[:2]}
    wishes.cancel(database, settings, job_id)
    files.forget_copies(database, worker)
    assert on_disk(worker) == [copies[0]]
    # What is not there any more is fetched again.
    assert filestore.ensure_local(worker, unused).read_bytes() == CONTENT


def test_what_was_there_before_there_was_a_store_is_no_copy(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    file = stored(database, settings)
    os.utime(filestore.local_path(settings, file).parent, (0, 0))
    remote = settings.model_copy(update={"files_url": f"memory://{settings.home.name}-later"})
    (settings.files / "file-that-is-none").write_text("")
    files.forget_copies(database, remote)
    assert filestore.local_path(settings, file).read_bytes() == CONTENT
    assert f"{file.id} is here and not in memory://" in caplog.text


def test_where_there_is_no_store_nothing_is_taken_for_a_copy(database: Database, settings: Settings) -> None:
    """As after restoring a database that is older than the files."""
    file = stored(database, settings)
    with database.transaction() as session:
        session.execute(delete(StoredFile))
    files.forget_copies(database, settings)
    assert on_disk(settings) == [filestore.local_path(settings, file)]


def test_bytes_of_a_killed_process_are_found_by_their_row(database: Database, settings: Settings) -> None:
    """Killed for real, between the row and the bytes' new name."""
    code = (
        "import os, signal, sys\n"
        "from jobs import files, filestore\n"
        "from jobs.database import Database\n"
        "from jobs.settings import Settings\n"
        "settings = Settings()\n"
        "filestore.durable.sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with filestore.Incoming(settings) as incoming:\n"
        "    incoming.write(b'x')\n"
        "    files.create(Database(settings.url), settings, files.NewFile('', 'x', 'fine-tune'), incoming)\n"
    )
    environment = os.environ | {"STIEFEL_HOME": str(settings.home), "STIEFEL_DATABASE_URL": settings.url}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    assert rows(database) == [Status.STORING]
    assert len(on_disk(settings)) == 1
    with database.transaction() as session:
        session.execute(update(StoredFile).values(checked_until=now() - 1))
    files.remove_due(database, settings)
    assert (rows(database), on_disk(settings)) == ([], [])
