#!/usr/bin/env bash
# python -m benchmarks.gpu on a machine with a CUDA device and without a network; see usage below.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
wheels=${WHEELS:-$here/wheels}
# What the benchmark imports beside torch, transformers and what these two need themselves.
packages=(deepspeed einops hjson msgpack ninja psutil py-cpuinfo
    pydantic pydantic-core annotated-types typing-inspection typing-extensions)

usage() {
    cat <<USAGE
usage: benchmarks/gpu.sh [ARGUMENTS of python -m benchmarks.gpu]

Measures training on this machine's CUDA device, without a network. torch (a CUDA build, 2.11 or newer) and transformers
must be there; what else is missing is installed from wheels into a virtual environment, and nothing elsewhere.

  PYTHON  the Python that has torch (python3)
  WHEELS  the folder of wheels (wheels/ beside this script)
  VENV    a folder for the virtual environment, which is kept (otherwise a temporary one, which is removed)

example: benchmarks/gpu.sh --model llama-60m llama-350m --variants full galore loro --out gpu.json

To fill the folder, on a machine of the same kind with a network, in a checkout; 3.12 stands for the other's Python:

  pip wheel --no-deps -c constraints.txt -w benchmarks/wheels deepspeed && \\
  pip download --no-deps --only-binary=:all: --python-version 3.12 -c constraints.txt -d benchmarks/wheels \\
    ${packages[*]:1}

All arguments: python -m benchmarks.gpu --help (which needs pydantic, but no device).
USAGE
}

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}

on=cuda
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --cpu) on=cpu ;;
    esac
done

command -v "$python" >/dev/null || fail "there is no $python; name the Python that has torch in PYTHON"
"$python" - "$on" "$wheels" "${packages[@]}" <<'CHECK'
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

on, wheels, *packages = sys.argv[1:]


def fail(why: str) -> None:
    sys.exit(f"gpu.sh: {why}")


def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if sys.version_info < (3, 11):
    fail(f"{sys.executable} is Python {sys.version.split()[0]}; name one from 3.11 on in PYTHON")
for name in ("torch", "transformers", "pip"):
    if not found(name):
        fail(f"{sys.executable} has no {name}; install it, or name a Python that has it in PYTHON")
if tuple(map(int, found("torch").split(".")[:2])) < (2, 11):
    fail(f"torch {found('torch')} is too old; install 2.11 or newer, or name a Python that has it in PYTHON")
if on == "cuda":
    import torch

    if torch.version.cuda is None:
        fail(f"torch {torch.__version__} is no CUDA build; install one (or try the benchmark out with --cpu)")
    if not torch.cuda.is_available():
        fail("torch finds no CUDA device here; use a machine with one (or try the benchmark out with --cpu)")
carried = {re.sub(r"[_.]", "-", file.name.split("-")[0]).lower() for file in Path(wheels).glob("*.whl")}
if missing := [name for name in packages if name not in carried and not found(name)]:
    fail(f"no wheel of {', '.join(missing)} in {wheels}; see gpu.sh --help for what fills it")
CHECK

if [[ -n ${VENV:-} ]]; then
    venv=$VENV
else
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi
# Without pip of its own, which needs a package that Debian leaves out; the machine's does.
"$python" -m venv --system-site-packages --without-pip "$venv"
# Where the machine's Python is a virtual environment itself, the new one would see what is behind it, but not it.
"$python" -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
    >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/machine.pth"

pinned=$(grep '^deepspeed==' "$root/constraints.txt")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" \
    "$pinned" 'pydantic>=2.13' ||
    fail "the wheels in $wheels do not do for $("$python" --version), as pip says above; see gpu.sh --help"

# Nothing is to be fetched, and no time lost in trying.
export HF_HUB_OFFLINE=1
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$venv/bin/python" -m benchmarks.gpu "$@"
