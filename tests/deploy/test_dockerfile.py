"""What the images are made of, as far as reading tells. That they can be built, and work: `make prove-image`."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from deepspeed.ops import op_builder
from deepspeed.ops.op_builder import builder as compiling
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.dockerfile import DOCKERFILE, ROOT, Stage, arguments, stages

TEXT = DOCKERFILE.read_text()
STAGES = stages()
IMAGES = [STAGES["api"], STAGES["trainer"]]
BUILDS = [STAGES["api-build"], STAGES["trainer-build"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(line.split("==")[0])
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}
image = pytest.mark.parametrize("image", IMAGES, ids=lambda stage: stage.name)
build = pytest.mark.parametrize("build", BUILDS, ids=lambda stage: stage.name)


def test_a_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_linter_is_not_to_look_at_is_one_line_with_a_reason() -> None:
    assert not list(ROOT.glob(".hadolint.y*ml"))
    for line in TEXT.splitlines():
        if "hadolint" in line:
            assert re.fullmatch(r"# hadolint ignore=DL\d{4} # .+", line), line


def test_bases_have_exact_versions() -> None:
    bases = {name: value for name, value in arguments().items() if ":" in value}
    assert bases.keys() == {"DEBIAN", "CUDA_BUILD", "CUDA_RUN"}
    for base in bases.values():
        assert re.search(r":\d+\.\d+[.\w-]*$", base), base
    # What is compiled in the one runs in the other.
    assert bases["CUDA_BUILD"].replace("-devel-", "-base-") == bases["CUDA_RUN"]
    assert all("$" in stage.base or stage.base in STAGES for stage in STAGES.values())


@image
def test_an_image_runs_as_a_user_without_rights(image: Stage) -> None:
    assert image.last("USER") == "10001:10001"
    words = [word for word, _ in image.instructions]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    [run] = image.all("RUN")
    assert "--owner 10001 --group 10001 --mode 0750 /var/lib/stiefel" in run


@image
def test_an_image_writes_to_tmp_and_to_its_home_alone(image: Stage) -> None:
    environment = image.environment
    assert environment["STIEFEL_HOME"] == "/var/lib/stiefel"
    for name, value in environment.items():
        if name == "HOME" or name.endswith(("_HOME", "_FILE")):
            assert value.startswith(("/tmp", "/var/lib/stiefel")), name
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_both_images_mean_the_same_where_they_name_the_same() -> None:
    one, other = (image.environment for image in IMAGES)
    assert {name: one[name] for name in one.keys() & other.keys()} == {
        name: other[name] for name in one.keys() & other.keys()
    }


@image
def test_an_image_says_what_it_is(image: Stage) -> None:
    labels = image.last("LABEL")
    for name in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert f'image.version="{PROJECT["project"]["version"]}"' in labels
    assert f'image.title="stiefel-{image.name}"' in labels
    assert f'image.licenses="{PROJECT["project"]["license"]}"' in labels


@image
def test_an_image_starts_a_program_of_ours_below_one_that_collects_orphans(image: Stage) -> None:
    assert json.loads(image.last("ENTRYPOINT")) == ["tini", "--"]
    python, flag, module, *_ = json.loads(image.last("CMD"))
    assert (python, flag) == ("python", "-m")
    assert find_spec(f"{module}.__main__")


@image
def test_an_image_tells_whether_it_is_well(image: Stage) -> None:
    [check] = image.all("HEALTHCHECK")
    assert {"api": "127.0.0.1:8000/healthz", "trainer": '"worker.alive"'}[image.name] in check


@image
def test_an_image_brings_no_compiler_and_no_installer(image: Stage) -> None:
    assert image.packages() <= {"ca-certificates", "libaio-dev", "libgomp1", "python3", "tini"}
    assert image.all("COPY") == [f"--from={image.name}-build /opt/stiefel /opt/stiefel"]
    assert re.search(r"pip uninstall --yes (setuptools )?pip$", STAGES[f"{image.name}-build"].last("RUN"))


@build
def test_every_version_comes_from_the_constraints(build: Stage) -> None:
    assert build.environment["PIP_CONSTRAINT"] == "/src/constraints.txt"
    steps = [rest for word, rest in build.instructions if word == "RUN" and re.search("pip (install|download)", rest)]
    for step in steps:
        # In an environment of its own pip would take the newest of what packages are built with.
        assert all(
            "--no-build-isolation" in command or command.strip().startswith("setuptools")
            for command in re.split(r"pip (?:install|download)", step)[1:]
        ), step
        assert "==" not in step


def test_the_constraints_pin_whatever_the_images_install() -> None:
    extras = {extra for names in re.findall(r"'\.\[([\w,]+)\]'", TEXT) for extra in names.split(",")}
    assert extras == {"api", "tokenizers", "trainer", "serve", "postgresql", "tracing", "s3", "gcs"}
    optional = PROJECT["project"]["optional-dependencies"]
    waiting = [Requirement(text) for text in PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]]
    waiting += [Requirement(text) for extra in extras for text in optional[extra]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, key = canonicalize_name(wanted.name), (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key not in seen:
            seen.add(key)
            assert name in PINS, f"constraints.txt does not pin {name}"
            waiting += _needs(wanted)


def _needs(wanted: Requirement) -> list[Requirement]:
    """Of a package that is installed here; those of others are looked at by `make prove-image`."""
    try:
        needs = [Requirement(text) for text in requires(wanted.name) or []]
    except PackageNotFoundError:
        return []
    extras = {*wanted.extras, ""}
    return [need for need in needs if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras)]


def test_the_operators_that_the_trainer_loads_are_compiled_ahead() -> None:
    loaded = {
        alias.name
        for file in (ROOT / "trainer").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed.ops")
        for alias in node.names
    }
    builders = {name for name in loaded if name.endswith("Builder")}
    assert builders
    for name in builders:
        assert f"{getattr(op_builder, name).BUILD_VAR}=1 " in TEXT, name


def test_deepspeed_still_says_what_the_image_replaces_in_it() -> None:
    """Else operators would be compiled for the processor of whoever builds the image."""
    source = inspect.getsource(compiling)
    replaced = re.search(r'sed -i "s/(\S+?)/\S+?/; s/(\S+?)/\S+?/" op_builder/builder.py', TEXT)
    assert replaced
    for text in replaced.groups():
        assert text in source


def test_nothing_but_the_packages_reaches_a_build() -> None:
    """Secrets, environments, runs and history are outside because only what is named is inside."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    first, named = lines[0], {line[1:] for line in lines if line.startswith("!")}
    assert first == "*"
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert named == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert {line for line in lines[1:] if not line.startswith("!")} == {"**/__pycache__", "**/*.pyc"}
