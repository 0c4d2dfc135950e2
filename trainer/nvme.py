"""State and parameters in files (`deepspeed.offload`, `offload_parameters`: nvme): whether it can be, and where.

The traps that live here (DeepSpeed 0.19):
- What is wrong with the machine shows late, as an abort or as a failed assertion in C++: a compiler that is missing, a
  limit on locked memory, a file system without O_DIRECT. All of it is asked here, before anything else is done.
- A write that fails, as on a full disk, is not noticed. So there has to be room before the first of them.
- A directory is emptied when a swapper is made for it. Models are sharded module by module, so all modules share one
  swapper (`trainer.engine.sharder`); runs share a disk, so each rank of a run has a directory of its own.
"""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder

from trainer.config import DeepSpeedSpec, TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir

_CAP_IPC_LOCK = 14


def fields_in_files(spec: DeepSpeedSpec) -> list[str]:
    return [field for field in ("offload", "offload_parameters") if getattr(spec, field) == "nvme"]


def check(spec: DeepSpeedSpec, tell: Callable[[str], None]) -> None:
    """Raises SpecError where something is to be kept in files and this machine cannot do it. Compiling is told."""
    if not (fields := fields_in_files(spec)):
        return
    directory = Path(spec.nvme_path or "")
    if not (directory.is_dir() and os.access(directory, os.W_OK)):
        raise SpecError(f"deepspeed.nvme_path: {str(directory)!r} is no directory that can be written to here")
    if not _writes_directly(directory):
        raise SpecError(
            f"deepspeed.nvme_path: the file system of {str(directory)!r} has no direct I/O (O_DIRECT), as those in "
            "memory have none; choose a directory on a disk"
        )
    if not _may_lock_memory():
        raise SpecError(
            f"deepspeed.{fields[0]}: nvme locks its buffers in memory, and this process may lock few; raise the limit "
            "(ulimit -l unlimited, or the capability IPC_LOCK), or use cpu"
        )
    if not _compiled():
        tell("loading DeepSpeed's asynchronous I/O, which is compiled at its first use")
    _load(fields[0])


def check_room(spec: DeepSpeedSpec, size: int, what: str) -> None:
    """Raises SpecError where the disk has no room for `size` bytes, which the ranks of this host write as `what`."""
    free = shutil.disk_usage(spec.nvme_path or "").free
    if size > free:
        raise SpecError(
            f"deepspeed.nvme_path: {spec.nvme_path!r} has {free / 1e9:.1f} GB free, and the {what} of this host's "
            f"ranks need {size / 1e9:.1f}; choose a larger disk, or use cpu"
        )


@contextmanager
def own_directory(spec: TrainingSpec, rundir: RunDir, local_rank: int) -> Iterator[TrainingSpec]:
    """The spec with a directory for this rank of this run alone as `nvme_path`; removed at the end.

    Its name follows from those of run and host, so that what a killed process has left is removed by the next.
    """
    if not fields_in_files(spec.deepspeed):
        yield spec
        return
    root = rundir.root.absolute()
    run = Path(spec.deepspeed.nvme_path or "") / f"stiefel-{root.name}-{zlib.crc32(str(root).encode()):08x}"
    own = run / f"{socket.gethostname()}-{local_rank}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        yield spec.model_copy(update={"deepspeed": spec.deepspeed.model_copy(update={"nvme_path": str(own)})})
    finally:
        shutil.rmtree(own, ignore_errors=True)
        # Only the last rank finds it empty.
        with suppress(OSError):
            run.rmdir()


def _compiled() -> bool:
    """Whether the operator was installed with DeepSpeed, for this accelerator, as in the images."""
    return bool(installed_ops.get(AsyncIOBuilder.NAME)) and accelerator_name == get_accelerator().device_name()


def _load(field: str) -> None:
    # ninja comes with the trainer's packages, and need not be on the path of whoever started it.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    builder = AsyncIOBuilder()
    try:
        # Which asks the compiler.
        if not (_compiled() or builder.is_compatible(verbose=False)):
            raise ImportError("libaio is not found")
        builder.load(verbose=False)
    except (ImportError, OSError, RuntimeError, TypeError, subprocess.SubprocessError) as error:
        raise SpecError(
            f"deepspeed.{field}: nvme needs DeepSpeed's async_io, which cannot be built on this machine ({error}); "
            "install libaio-dev, ninja and a C++ compiler (with GPUs, the CUDA toolkit), or use cpu"
        ) from error


def _writes_directly(directory: Path) -> bool:
    probe = directory / f".stiefel-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _may_lock_memory() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    effective = re.search(r"CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text())
    capable = effective is not None and bool(int(effective[1], 16) >> _CAP_IPC_LOCK & 1)
    return soft == resource.RLIM_INFINITY or capable
