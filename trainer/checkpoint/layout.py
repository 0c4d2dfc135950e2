"""What writing and reading have to agree on. The tree of a checkpoint is in the package's docstring."""

import hashlib
from pathlib import Path

from torch import Tensor, nn

STATE, FORMAT = "state.json", 2


def digest(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state, not rotary tables and their like. Equal on all ranks, at any stage."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
