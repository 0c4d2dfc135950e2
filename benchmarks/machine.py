"""What a benchmark ran on: the machine, the versions, the day."""

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("stiefel", "torch", "deepspeed", "transformers", "galore-torch", "peft")


def machine() -> str:
    """For a heading: "2 cores of AMD EPYC, 2026-11-22"."""
    return f"{os.cpu_count()} cores of {_processor()}, {date.today()}"


def described(device: str | None = None) -> dict[str, Any]:
    """For programs. `device`: the accelerator, where one was used."""
    return {
        "machine": f"{device}, {date.today()}" if device else machine(),
        "date": str(date.today()),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "revision": _revision(),
        "command": " ".join(["python", "-m", *_module(), *map(_shown, sys.argv[1:])]),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit, "-dirty" where what is measured differs from it: not where only figures and pages do."""
    if shutil.which("git") is None:
        return None
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _shown(argument: str) -> str:
    """Without what a URL says of who asks: it may be a password."""
    return re.sub(r"//[^/@\s]*@", "//", argument)


def _module() -> list[str]:
    main = sys.modules["__main__"]
    return [main.__spec__.name] if main.__spec__ else []
