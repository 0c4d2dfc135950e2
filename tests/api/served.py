"""The API in a process of its own, at a real port, without broker and workers; and openai clients of it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from jobs import keys
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.settings import Settings
from migrations.__main__ import upgrade
from trainer.process import free_port


@dataclass
class Served:
    url: str
    process: int
    settings: Settings
    database: Database
    requests: Path
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, quotas: Quotas | None = None) -> OpenAI:
        _, key = keys.create(self.database, "somebody", [Scope.WRITE], quotas or Quotas())
        return self.with_key(key)

    def with_key(self, key: str) -> OpenAI:
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=key))
        return self.clients[-1]

    def memory(self, what: str) -> int:
        """Bytes: VmRSS, now; VmHWM, the most so far."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return int(status.partition(f"{what}:")[2].split()[0]) * 1024

    def kept(self) -> list[Path]:
        return [path for path in self.settings.files.rglob("*") if path.is_file()]

    def asked(self, line: str) -> int:
        """How often, by the log."""
        return self.requests.read_text().count(line)


@contextmanager
def serving(home: Path, **changed: Any) -> Iterator[Served]:
    """`changed`: settings. Its database is a SQLite file in `home`."""
    port = free_port()
    settings = Settings(home=home, redis_url=f"redis://127.0.0.1:{free_port()}/0", **changed)
    upgrade(settings.url)
    given = {"home": home, "redis_url": settings.redis_url} | changed
    environment = os.environ | {f"STIEFEL_{name.upper()}": str(value) for name, value in given.items()}
    with (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "api", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/healthz")
            break
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.05)
    database = Database(settings.url)
    served = Served(url, process.pid, settings, database, home / "log")
    try:
        yield served
    finally:
        for client in served.clients:
            client.close()
        database.close()
        process.terminate()
        process.wait(30)
