"""Which class an exception belongs to; the real ones, where they can be had here."""

import errno
import os
import subprocess
import sys

import pytest

from trainer import errors
from trainer.errors import classify


def test_a_tensor_that_the_host_cannot_hold() -> None:
    """torch's own exception, in a process that may have little memory."""
    code = (
        "import resource, torch\n"
        "from trainer.errors import classify\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n    torch.empty(64 << 30, dtype=torch.uint8)\n"
        "except RuntimeError as error:\n    print(classify(error).name, classify(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("out_of_memory_host RuntimeError: "), done.stderr
    assert "Use a smaller micro_batch" in done.stdout


class OutOfMemoryError(RuntimeError):
    """torch.cuda's has this name."""


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (MemoryError(), "out_of_memory_host"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory_device"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out_of_memory_device"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "infrastructure"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "infrastructure"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "infrastructure"),
        (FileNotFoundError(errno.ENOENT, "no such file"), "unknown"),
        (ValueError("anything"), "unknown"),
    ],
)
def test_each_has_its_class_and_keeps_its_cause(error: Exception, name: str) -> None:
    leaf = classify(error)
    assert leaf.name == name
    assert leaf.__cause__ is error
    assert type(error).__name__ in str(leaf)


def test_exit_codes_and_names_are_each_one_s_own() -> None:
    leaves = (errors.TrainerError, *errors.LEAVES)
    assert len({leaf.name for leaf in leaves}) == len({leaf.exit_code for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert errors.leaf_of_exit_code(leaf.exit_code) is leaf
        assert errors.exit_code_of(leaf.name) == leaf.exit_code
    assert classify(errors.DataError("as it is")).name == "bad_data"
