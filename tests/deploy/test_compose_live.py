"""What of docker-compose.yml runs without an engine, run: the broker's command, the making of Prometheus' API key, and
Prometheus' own judgement of its configuration."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from cli.broker import find_server
from jobs import keys
from jobs.database import Database
from jobs.keys import Scope
from migrations.__main__ import upgrade
from tests.deploy.compose import PROFILES, SECRETS, read
from tests.deploy.dockerfile import ROOT
from trainer.process import free_port


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(read(*PROFILES)["services"])


def script(service: dict[str, Any]) -> list[str]:
    """What a container's shell gets: `$$` is how Compose writes `$`."""
    return [word.replace("$$", "$") for word in service["command"]]


@contextmanager
def broker(service: dict[str, Any], directory: Path, port: int) -> Iterator[None]:
    (directory / "bin").mkdir(exist_ok=True)
    (directory / "bin" / "valkey-server").unlink(missing_ok=True)
    (directory / "bin" / "valkey-server").symlink_to(find_server())
    *shell, text = script(service)
    assert text.count("--dir /data ") == 1
    text = text.replace("--dir /data ", f"--dir {directory} --port {port} ")
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen([*shell, text], env={"PATH": path, **service["environment"]}, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        # The shell has become the server, which hears Docker's SIGTERM.
        assert process.wait(timeout=20) == 0


def connect(port: int, password: str | None) -> redis.Redis:
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
    return redis.Redis(port=port, password=password, retry=retry, decode_responses=True)


def test_the_broker_wants_its_password_and_keeps_what_it_was_told(services: dict[str, Any], tmp_path: Path) -> None:
    service, port = services["redis"], free_port()
    with broker(service, tmp_path, port):
        with pytest.raises(redis.AuthenticationError):
            connect(port, None).ping()
        client = connect(port, SECRETS["REDIS_PASSWORD"])
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        client.set("told", "kept")
        command = Path(f"/proc/{client.info('server')['process_id']}/cmdline").read_bytes()
        assert SECRETS["REDIS_PASSWORD"].encode() not in command
    with broker(service, tmp_path, port):
        assert connect(port, SECRETS["REDIS_PASSWORD"]).get("told") == "kept"


def test_prometheus_gets_an_api_key_that_reads_and_keeps_it(services: dict[str, Any], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'stiefel.db'}"
    upgrade(url)
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o700)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for _ in range(2):
        subprocess.run(
            script(services["metrics-key"]), cwd=volume, env={"PATH": path, "STIEFEL_DATABASE_URL": url}, check=True
        )
    database = Database(url)
    caller = keys.identify(database, (volume / "prometheus").read_text())
    assert caller is not None and caller.scopes == {Scope.READ}
    assert len(keys.list_keys(database)) == 1
    database.close()
    # For another user, to whom the file is mounted.
    assert volume.stat().st_mode & 0o055 == 0o055
    assert [file.name for file in volume.iterdir()] == ["prometheus"]
    assert (volume / "prometheus").stat().st_mode & 0o004


def mounted(service: dict[str, Any], root: Path) -> None:
    """The files of this repository, where the container has them."""
    for mount in service["volumes"]:
        if mount["type"] == "bind":
            place = root / mount["target"].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(mount["source"])


def test_prometheus_accepts_its_configuration(services: dict[str, Any], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: apt-get install prometheus")
    mounted(services["prometheus"], tmp_path)
    [key] = [mount for mount in services["prometheus"]["volumes"] if mount["source"] == "metrics-key"]
    place = tmp_path / key["target"].lstrip("/")
    place.mkdir(parents=True)
    (place / "prometheus").write_text("sk-stiefel-key")
    configuration = tmp_path / "etc" / "prometheus" / "prometheus.yml"
    # Not a link any more: what it names is looked for beside the file itself.
    text = configuration.read_text()
    configuration.unlink()
    configuration.write_text(text)
    done = subprocess.run([promtool, "check", "config", str(configuration)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = {path.name for path in (ROOT / "helm" / "stiefel" / "rules").glob("*.yaml")}
    assert rules and all(f"rules/{name}" in done.stdout for name in rules)


def test_what_prometheus_scrapes_is_what_runs(services: dict[str, Any]) -> None:
    configuration = yaml.safe_load((ROOT / "compose" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]}
    reaper = services["reaper"]["command"]
    assert targets == {
        "stiefel-exporter": [f"reaper:{reaper[reaper.index('--metrics-port') + 1]}"],
        "stiefel-api": [f"api:{services['api']['ports'][0]['target']}"],
    }
    for [target] in targets.values():
        host = target.partition(":")[0]
        assert services[host]["networks"].keys() & services["prometheus"]["networks"].keys()
