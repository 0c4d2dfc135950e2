"""docker-compose.yml as the real Compose reads it, which needs no engine for that."""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.deploy.dockerfile import ROOT

SECRETS = {"POSTGRES_PASSWORD": "one", "REDIS_PASSWORD": "two", "GRAFANA_PASSWORD": "three"}
SECRETS |= {"GENERATOR_SECRET": "four, of 16 characters or more"}
PROFILES = ("gpu", "cpu", "generator", "monitoring")


def read(*profiles: str, settings: dict[str, str] | None = None) -> dict[str, Any]:
    done = run(*profiles, settings=SECRETS | (settings or {}))
    # No warning either: of a variable without a value, for one.
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def run(*profiles: str, settings: dict[str, str], file: Path = Path(os.devnull)) -> subprocess.CompletedProcess[str]:
    """`docker-compose config` with these settings and nothing of whoever runs the tests."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    return subprocess.run(
        [_binary(), "--file", str(ROOT / "docker-compose.yml"), "--env-file", str(file), *chosen]
        + ["config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere"} | settings,
        capture_output=True,
        text=True,
    )


def _binary() -> str:
    """The program itself: the package's own command forgets its exit code."""
    package = find_spec("compose")
    assert package is not None and package.origin is not None
    return str(Path(package.origin).with_name("docker-compose"))
