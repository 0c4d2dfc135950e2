"""The embedded stack: broker, migrations, API, reaper and workers as children of one process.

For a laptop, a first look and the tests; a cluster runs the same processes under compose or Helm.
"""

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis
from pydantic import TypeAdapter

from cli.broker import BrokerConfig, find_server
from jobs.settings import Settings
from trainer import logs
from trainer.exporting import EXPORTS_BYTES
from trainer.process import free_port

log = logging.getLogger("stiefel.stack")

# A worker that is told to end waits for its trainer's last checkpoint, for the grace period, and then says goodbye.
_GOODBYE_SECONDS = 15
_OF_THE_SERVICE = re.compile("STIEFEL_.*|PGPASSWORD|CELERY_BROKER_URL")


class StackError(Exception):
    """A child did not come up; the message holds the end of its log."""


@dataclass
class Child:
    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


@dataclass
class Stack:
    """Start with `start` or `with`; everything it started ends with it, also when it is killed.

    `port` 0 takes a free one. `environment` holds STIEFEL_* settings for the children, such as STIEFEL_DATABASE_URL;
    with STIEFEL_REDIS_URL no broker is started. With a `metrics_port` the reaper exports metrics there. With a
    `generator` models can be tried out: it is not waited for, and imports no torch before somebody asks.
    """

    home: Path
    port: int = 8000
    workers: int = 1
    metrics_port: int | None = None
    generator: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Stack":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """All children, each waited for. Raises StackError or NoBroker, with everything stopped again."""
        self.home = self.home.absolute()
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        _check_port(self.port)
        self._settings = {k: v for k, v in os.environ.items() if k.startswith("STIEFEL_")} | self.environment
        self._settings["STIEFEL_HOME"] = str(self.home)
        grace = self._settings.get("STIEFEL_GRACE_SECONDS", Settings.model_fields["grace_seconds"].default)
        self._worker_seconds = float(grace) + _GOODBYE_SECONDS
        # It listens on the loopback interface alone.
        self._settings.setdefault("STIEFEL_AUTH", "off")
        try:
            if "STIEFEL_REDIS_URL" not in self._settings:
                self._start_broker()
            self._migrate()
            python = sys.executable
            if self.generator:
                self._start_generator()
            self._start(
                "api",
                [python, "-m", "api", "--host", "127.0.0.1", "--port", str(self.port)],
            )
            exporter = ["--metrics-port", str(self.metrics_port)] if self.metrics_port is not None else []
            self._start("reaper", [python, "-m", "jobs.reaper", *exporter])
            for number in range(1, self.workers + 1):
                self._start(f"worker-{number}", [python, "-m", "worker"], {"STIEFEL_WORKER": f"worker-{number}"})
            self._wait_for("api", lambda: httpx.get(f"{self.api_url}/readyz", timeout=2).status_code == 200)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Workers first, so that trainers checkpoint; then the rest. What does not end in time is killed."""
        workers = [child for child in self.children.values() if child.name.startswith("worker")]
        others = [child for child in reversed(self.children.values()) if child not in workers]
        for child in workers:
            self._process(child.name).terminate()
        for child in workers:
            self._end(child, self._worker_seconds)
        for child in others:
            self._process(child.name).terminate()
            self._end(child, 10)
        self.children.clear()

    def revive(self) -> list[str]:
        """Start again what has ended by itself; returns the names."""
        ended = [c for c in self.children.values() if c.process is not None and c.process.poll() is not None]
        for child in ended:
            self._spawn(child)
        return [child.name for child in ended]

    def kill(self, name: str) -> None:
        """SIGKILL one child, as a crash would."""
        process = self._process(name)
        process.kill()
        process.wait()

    def restart(self, name: str) -> None:
        """Start one child again that has ended, or is about to."""
        self._process(name).wait(self._worker_seconds)
        self._spawn(self.children[name])

    def pid(self, name: str) -> int:
        return self._process(name).pid

    # ------------------------------------------------------------------------------------------------------ private

    def _start_broker(self) -> None:
        config = BrokerConfig(self.home / "broker", free_port(), secrets.token_hex(16))
        self._start("broker", [find_server(), str(config.write())])
        self._settings["STIEFEL_REDIS_URL"] = config.url
        client = redis.Redis.from_url(config.url)
        self._wait_for("broker", lambda: bool(client.ping()))
        client.close()

    def _start_generator(self) -> None:
        """It may run code that comes with a model, and so is told nothing of the service but what it shows the API."""
        port, secret = free_port(), secrets.token_hex(16)
        self._settings |= {"STIEFEL_GENERATOR_URL": f"http://127.0.0.1:{port}", "STIEFEL_GENERATOR_SECRET": secret}
        code = TypeAdapter(bool).validate_python(self._settings.get("STIEFEL_TRUST_REMOTE_CODE", "0"))
        told = {name: value for name, value in os.environ.items() if not _OF_THE_SERVICE.fullmatch(name)}
        told |= {"STIEFEL_GENERATOR_SECRET": secret, "STIEFEL_TRUST_REMOTE_CODE": str(int(code))}
        known = (logs.FORM, logs.LEVEL, EXPORTS_BYTES)
        told |= {name: self._settings[name] for name in known if name in self._settings}
        # Not on a GPU, which trainings want whole.
        command = [sys.executable, "-m", "trainer", "serve", "--port", str(port), "--device", "cpu"]
        self.children["generator"] = Child("generator", command, self.home / "logs" / "generator.log", told)
        self._spawn(self.children["generator"])

    def _migrate(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "migrations"], env=os.environ | self._settings, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise StackError(f"the migrations failed:\n{done.stderr[-2000:]}")

    def _start(self, name: str, command: list[str], extra: dict[str, str] | None = None) -> None:
        child = Child(name, command, self.home / "logs" / f"{name}.log", os.environ | self._settings | (extra or {}))
        self.children[name] = child
        self._spawn(child)

    def _spawn(self, child: Child) -> None:
        with child.log.open("ab") as output:
            child.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.child", str(os.getpid()), *child.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child.environment,
                # Ctrl-C in a terminal goes to the whole group: only this process shall hear it.
                start_new_session=True,
            )

    def _process(self, name: str) -> subprocess.Popen[bytes]:
        process = self.children[name].process
        assert process is not None
        return process

    def _end(self, child: Child, seconds: float) -> None:
        assert child.process is not None
        try:
            child.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s; killing it", child.name, seconds)
            child.process.kill()
            child.process.wait()

    def _wait_for(self, name: str, ready: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        child = self.children[name]
        while time.monotonic() < deadline:
            if self._process(name).poll() is not None:
                raise StackError(f"{name} ended with exit code {self._process(name).returncode}:\n{child.tail()}")
            try:
                if ready():
                    return
            except (redis.exceptions.RedisError, httpx.HTTPError):
                pass  # not up yet: that is what is being waited for
            time.sleep(0.1)
        raise StackError(f"{name} was not ready within {seconds:g} s:\n{child.tail()}")


def _check_port(port: int) -> None:
    """Before anything is started: whoever listens there already would answer in the API's place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from error
