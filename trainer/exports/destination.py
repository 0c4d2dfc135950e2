"""Where an export goes: a directory that appears with everything in it, or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import SpecError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Destination:
    """Files are written into `directory`, which is `out` afterwards; floating-point tensors in `dtype`.

    `shard_bytes`: the most that one file of tensors holds, but for a single tensor that is larger.
    """

    directory: Path
    out: Path
    shard_bytes: int
    dtype: torch.dtype

    def typed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the block has ended well, and vanishes when it has not.

    Raises SpecError where `out` is there already and not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SpecError(f"OUT: {out} is there already and not an empty directory; remove it or choose another name")
    # Beside it, for a rename only works within one file system; the process id, for two exports may be under way.
    out = out.absolute()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def bytes_of(size: str) -> int:
    """5GB → 5·10⁹; powers of ten, as Hugging Face counts. Raises SpecError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise SpecError(f"--shard-size: {size!r} is no size; give a number above 0 and KB, MB, GB or TB, such as 5GB")
    return count
