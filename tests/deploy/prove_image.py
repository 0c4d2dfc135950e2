"""python -m tests.deploy.prove_image: build the Dockerfile's images and run what they are for. No registry, no engine.

The base is a root made by debootstrap, which is what Debian's own image is. buildah builds the API's image and the CPU
trainer's from this very Dockerfile, with pip's settings of whoever runs this. What was built then runs as in
docker-compose.yml (container.py). Needs root, and apt-get install buildah debootstrap.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.deploy.compose import read
from tests.deploy.container import Image, configuration
from tests.deploy.dockerfile import ROOT
from trainer import events

BASE = "localhost/stiefel-proof-base"
# Of the base images' arguments, all that an unused stage asks for as well.
BASES = ("DEBIAN", "CUDA_BUILD", "CUDA_RUN")
# torch names the versions of these itself.
OF_TORCH = re.compile(r"nvidia-|cuda-toolkit$|triton$")
# Every parameter and every moment of it is large enough for a file of its own.
OFFLOADED = {
    "model": {"preset": "llama-9m"},
    "dataset": {"source": "python-stdlib", "sequence_length": 64},
    "method": {"name": "galore", "rank": 64, "period": 1},
    "optimisation": {"steps": 2, "global_batch": 4},
    "deepspeed": {"zero_stage": 3, "offload": "nvme", "offload_parameters": "nvme", "nvme_path": "/nvme"},
    "resources": {"processes": 2},
}

# A tokeniser of three words, made and then counted with.
COUNTS = """
mkdir /tmp/tokenizer
python -c '
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({"a": 0, "larch": 1, "?": 2, "</s>": 3}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained("/tmp/tokenizer")
' >/dev/null
echo '{"text": "a larch ?"}' > /tmp/x.jsonl
python -m trainer examine /tmp/x.jsonl --json --count /tmp/tokenizer
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.prove_image", description=__doc__)
    parser.add_argument("targets", nargs="*", default=["api", "trainer"], help="default: api trainer")
    parser.add_argument("--storage-driver", default="overlay", help="buildah's; vfs works everywhere, slowly")
    arguments = parser.parse_args()
    if missing := [tool for tool in ("buildah", "debootstrap", "unshare", "ip") if shutil.which(tool) is None]:
        sys.exit(f"{', '.join(missing)} not found: apt-get install buildah debootstrap util-linux iproute2")
    if os.geteuid() != 0:
        sys.exit("only root can make a root file system; this changes nothing outside of a temporary directory")
    # As with Ctrl-C: nothing is left mounted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="stiefel-proof-", dir="/var/tmp") as directory:
        store = Store(Path(directory), arguments.storage_driver)
        try:
            prove(store, arguments.targets)
        finally:
            store.close()


def prove(store: "Store", targets: list[str]) -> None:
    with told("debootstrap"):
        store.make_base()
    print(f"{size(store.unpack_base().root) / 1e6:8.0f} MB  the base alone", flush=True)
    for target in targets:
        with told(f"build {target}"):
            store.build(target)
        image = store.unpack(target)
        print(f"{size(image.root) / 1e6:8.0f} MB  {target}", flush=True)
        CHECKS[target](image, store.directory)


def check_api(image: Image, directory: Path) -> None:
    volumes = {"/var/lib/stiefel": volume(directory / "api")}
    reaper = read()["services"]["reaper"]
    with told("api: versions are the constraints'"):
        check_versions(image)
    with told("api: no torch, no installer"):
        image.run(["python", "-c", "import api.main, jobs.reaper, cli.main, migrations.__main__"], volumes, 60)
        image.run(["sh", "-c", "! python -c 'import torch' && ! python -c 'import pip'"], volumes, 60)
    with told("api: counts tokens with a tokeniser of Hugging Face's"):
        counted = image.run(["sh", "-euc", COUNTS], volumes, 60)
        *_, report = counted.splitlines()  # behind what transformers says of torch
        assert json.loads(report)["statistics"]["tokens"]["tokens"] == 4, counted  # three words, and the end
    with told("api: migrations, twice"):
        for _ in range(2):
            image.run(["python", "-m", "migrations"], volumes, 60)
    with told("api: a key"):
        made = image.run(["stiefel", "keys", "create", "--json", "--name", "a", "--scope", "read"], volumes, 60)
        assert "sk-stiefel-" in made, made
    with told("api: the image's own command, judged by its own check"):
        image.serve(image.configuration["Cmd"], image.configuration["Healthcheck"]["Test"], volumes)
    with told("api: the reaper of docker-compose.yml, judged by its own check"):
        image.serve(reaper["command"], reaper["healthcheck"]["test"], volumes)


def check_trainer(image: Image, directory: Path) -> None:
    home, disk = volume(directory / "trainer"), volume(directory / "disk")
    volumes = {"/var/lib/stiefel": home, "/nvme": disk}
    with told("trainer: versions are the constraints'"):
        check_versions(image)
    with told("trainer: no compiler"):
        image.run(["sh", "-c", "! command -v cc c++ gcc g++ clang nvcc"], volumes, 60)
    with told("trainer: nothing that only newer processors know"):
        operators = sorted(image.root.glob("opt/stiefel/lib/python3*/site-packages/deepspeed/ops/**/*_op*.so"))
        assert [re.sub(r"_op\..*", "", file.name) for file in operators] == ["async_io", "pin_memory"]
        for file in operators:
            assert "%zmm" not in run("objdump", "--disassemble", "--no-show-raw-insn", str(file)), file
    example = json.loads((ROOT / "examples" / "galore.json").read_text())
    example["optimisation"]["steps"] = 5
    with told("trainer: five steps of examples/galore.json"):
        train(image, volumes, "example", example)
    with told("trainer: two ranks at ZeRO stage 3, state and parameters in files"):
        train(image, volumes, "offloaded", OFFLOADED)


CHECKS = {"api": check_api, "trainer": check_trainer}


def train(image: Image, volumes: dict[str, Path], name: str, spec: dict[str, object]) -> None:
    """Where nothing is compiled: what is, would be a new shared library, and /tmp does not execute it."""
    rundir = volume(volumes["/var/lib/stiefel"] / name)
    (rundir / "spec.json").write_text(json.dumps(spec))
    script = f"""
        python -m trainer run /var/lib/stiefel/{name} || exit
        find /tmp /var/lib/stiefel -name '*.so' -o -name '*.o' -o -name build.ninja | grep . && exit 1
        exit 0
    """
    image.run(["sh", "-uc", script], volumes, 600)
    last = events.parse((rundir / "events.jsonl").read_bytes().splitlines()[-1])
    assert isinstance(last, events.Finished), last


def check_versions(image: Image) -> None:
    """Each installed package has the version of constraints.txt; torch's own libraries those that torch names."""
    script = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for line in image.run(["python", "-c", script], {}, 60).splitlines():
        name, version = line.split()
        if canonicalize_name(name) != "stiefel" and not OF_TORCH.match(name):
            # Without the part that says which build it is, as in 2.13.0+cpu.
            assert pinned.get(canonicalize_name(name)) == version.partition("+")[0], line


class Store:
    """What buildah keeps, in a directory of its own."""

    def __init__(self, directory: Path, driver: str) -> None:
        self.directory = directory
        self._buildah = ["buildah", "--storage-driver", driver]
        self._buildah += ["--root", str(directory / "images"), "--runroot", str(directory / "state")]

    def make_base(self) -> None:
        root = self.directory / "debian"
        run("debootstrap", "--variant=minbase", "bookworm", str(root))
        # What Debian's own image has and a new root has not: packages are not kept once they are installed.
        shutil.rmtree(root / "var" / "cache" / "apt" / "archives")
        (root / "etc" / "apt" / "apt.conf.d" / "docker-clean").write_text(
            'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin"; };\n'
        )
        container = self._run("from", "scratch").strip()
        self._run("copy", "--quiet", container, str(root), "/")
        self._run("commit", "--quiet", "--format", "docker", container, BASE)
        shutil.rmtree(root)

    def build(self, target: str) -> None:
        """With layers: what a stage before the target has made is not made again for the next target."""
        pip = self.directory / "pip.conf"
        volumes = write_pip_settings(pip)
        arguments = {"ACCELERATOR": "cpu"} | dict.fromkeys(BASES, BASE)
        command = [*self._buildah, "bud", "--layers", "--isolation", "chroot", "--format", "docker"]
        command += ["--secret", f"id=pip,src={pip}", *(word for v in volumes for word in ("--volume", v))]
        command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        command += ["--target", target, "--tag", f"localhost/stiefel-{target}", str(ROOT)]
        with (self.directory / f"{target}.log").open("w+") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment())
            if done.returncode != 0:
                log.seek(0)
                sys.exit(f"{''.join(log.readlines()[-60:])}\n{target} cannot be built")

    def unpack(self, target: str) -> Image:
        name = f"localhost/stiefel-{target}"
        container = self._run("from", name).strip()
        root = Path(self._run("mount", container).strip())
        return Image(root, configuration(self._run("inspect", "--type", "image", name)))

    def unpack_base(self) -> Image:
        return Image(Path(self._run("mount", self._run("from", BASE).strip()).strip()), {})

    def close(self) -> None:
        """Nothing stays mounted below the directory, which can be removed then."""
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            mounted = line.split()[1]
            if Path(mounted).is_relative_to(self.directory):
                run("umount", "--lazy", mounted)

    def _run(self, *words: str) -> str:
        return run(*self._buildah, *words, **self._environment())

    def _environment(self) -> dict[str, str]:
        """Cache mounts and uploads lie below TMPDIR."""
        temporary = self.directory / "tmp"
        temporary.mkdir(exist_ok=True)
        return os.environ | {"TMPDIR": str(temporary)}


def write_pip_settings(file: Path) -> list[str]:
    """pip's settings as they are outside, into a pip.conf; the volumes for files and directories that they name."""
    settings, places = dict[str, str](), dict[str, str]()
    # What the environment says is above what files say.
    for line in sorted(run(sys.executable, "-m", "pip", "config", "list").splitlines(), key=_of_environment):
        name, _, text = line.partition("=")
        words = ast.literal_eval(text).split()
        for index, word in enumerate(words):
            place = Path(word.removeprefix("file://"))
            if place.is_absolute() and place.exists():
                # What an index links to lies beside it.
                inside = places.setdefault(str(place.parent), f"/mnt/pip/{len(places)}")
                words[index] = word.replace(str(place), f"{inside}/{place.name}")
        settings[name.rpartition(".")[2]] = " ".join(words)
    file.touch(mode=0o600)
    file.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items())]) + "\n")
    return [f"{source}:{target}:ro" for source, target in places.items()]


def _of_environment(line: str) -> bool:
    return line.startswith(":env:")


def volume(directory: Path) -> Path:
    """A new directory, as a new volume gets it from the image."""
    directory.mkdir(mode=0o750)
    os.chown(directory, 10001, 10001)
    return directory


def size(root: Path) -> int:
    return int(run("du", "--summarize", "--block-size=1", "--one-file-system", str(root)).split()[0])


@contextmanager
def told(what: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stdout}\n{error.stderr or ''}\nFAILED: {what}")
    print(f"{time.monotonic() - started:8.1f} s   {what}", flush=True)


def run(*words: str, **environment: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment or None).stdout


if __name__ == "__main__":
    main()
