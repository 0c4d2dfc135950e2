"""What a run may name on the machine that trains it: directories to read, places to write, a model's own code.

Whoever starts a trainer for others says so in its environment; without that, a run may what its user may. Imports no
torch.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import has_magic, iglob
from pathlib import Path

from trainer.config import TrainingSpec
from trainer.datasetconfig import Examples, HubDataset, JsonlDataset, TextDataset
from trainer.errors import SpecError
from trainer.modelconfig import DirectoryModel, HubModel

_READABLE, _WRITABLE, _CODE = "STIEFEL_READABLE", "STIEFEL_WRITABLE", "STIEFEL_TRUST_REMOTE_CODE"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A name alone may be a packaged reader ("text", "json", …), which reads what lies around it.
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF_THE_HUB = ("hf://", "https://huggingface.co/")
# What separates places in the environment: no path of a sensible installation, and no URL, holds one.
_BETWEEN = "\n"


class Outside(SpecError):
    """`field` names what lies outside; `reason` says of what."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(f"{field}: {reason}")


@dataclass(frozen=True)
class Access:
    """`readable`: directories; `writable`: directories and URLs. What lies below them is allowed; None: anything."""

    readable: tuple[str, ...] | None = None
    writable: tuple[str, ...] | None = None
    trust_remote_code: bool = False

    def environment(self) -> dict[str, str]:
        """For the trainer that is started."""
        limits = {_READABLE: self.readable, _WRITABLE: self.writable}
        told = {name: _BETWEEN.join(places) for name, places in limits.items() if places is not None}
        return told | {_CODE: str(int(self.trust_remote_code))}

    @staticmethod
    def of_environment() -> "Access":
        def places(name: str) -> tuple[str, ...] | None:
            return tuple(filter(None, os.environ[name].split(_BETWEEN))) if name in os.environ else None

        return Access(places(_READABLE), places(_WRITABLE), os.environ.get(_CODE) == "1")


def remote_code() -> dict[str, bool]:
    """For transformers: whether a model or tokeniser may bring Python files that are run here."""
    return {"trust_remote_code": Access.of_environment().trust_remote_code}


def check(spec: TrainingSpec, access: Access) -> None:
    """Links are followed: what counts is where a file lies. Raises Outside."""
    if access.readable is not None:
        for field, path in _read(spec):
            _check_readable(field, path, access.readable)
    if access.writable is not None:
        for field, place in _written(spec):
            if not any(_below(place, root) for root in access.writable):
                raise Outside(field, f"{place!r} is outside of what may be written here: {_said(access.writable)}")


def check_directory(field: str, path: str, access: Access) -> None:
    """A directory that is read from. Raises Outside."""
    if access.readable is not None:
        _check_readable(field, path, access.readable)


def check_data_files(files: Iterable[str], access: Access) -> None:
    """What a dataset's own description says is read: from the hub, or from where may be read. Raises Outside."""
    for file in files:
        if access.readable is not None and not file.startswith(_OF_THE_HUB):
            _check_readable("dataset.name", file, access.readable)


def _read(spec: TrainingSpec) -> Iterator[tuple[str, str]]:
    """(field, path or pattern) of everything that is read from this machine, but for what is no path at all."""
    dataset, model = spec.dataset, spec.model
    if isinstance(dataset, TextDataset | JsonlDataset | Examples):
        yield from (("dataset.files", file) for file in dataset.files)
    if isinstance(dataset, Examples):
        yield from (("dataset.validation_files", file) for file in dataset.validation_files)
    if isinstance(dataset, HubDataset) and (not _HUB_DATASET.fullmatch(dataset.name) or Path(dataset.name).exists()):
        yield "dataset.name", dataset.name
    if isinstance(model, DirectoryModel):
        yield "model.path", model.path
    if isinstance(model, HubModel) and _is_path(model.hub):
        yield "model.hub", model.hub
    if spec.tokenizer != "bytes" and _is_path(spec.tokenizer):
        yield "tokenizer", spec.tokenizer


def _written(spec: TrainingSpec) -> Iterator[tuple[str, str]]:
    if spec.checkpoints.url is not None:
        yield "checkpoints.url", spec.checkpoints.url
    if spec.deepspeed.nvme_path is not None:
        yield "deepspeed.nvme_path", spec.deepspeed.nvme_path


def _is_path(name: str) -> bool:
    """The libraries take a hub's name for a directory where there is one of that name."""
    return _HUB_ID.fullmatch(name) is None or Path(name).exists()


def _check_readable(field: str, path: str, roots: tuple[str, ...]) -> None:
    refusal = Outside(field, f"{path!r} is outside of what may be read here: {_said(roots)}")
    *directories, _ = Path(path).parts or ("",)
    magic = [part for part in directories if has_magic(part)]
    if magic and (magic != ["**"] or directories[-1] != "**"):
        # Each would be a directory to list, and a link among them could lead anywhere.
        raise Outside(field, f"{path!r}: only a file's name may be a pattern here, with at most one ** before it")
    # Before anything is listed: not even what there is shall be found out.
    fixed = Path(*_until_magic(Path(path)))
    if ".." in Path(path).parts or not any(_lies_below(fixed, root) for root in roots):
        raise refusal
    matches = iglob(path, recursive=True) if has_magic(path) else [path]
    for match in matches:
        if not any(_lies_below(Path(match), root) for root in roots):
            raise refusal


def _until_magic(path: Path) -> Iterator[str]:
    for part in path.parts:
        if has_magic(part):
            return
        yield part


def _below(place: str, root: str) -> bool:
    place, root = place.removeprefix("file://"), root.removeprefix("file://")
    _, is_url, path = place.partition("://")
    if not is_url:
        return "://" not in root and _lies_below(Path(place), root)
    return ".." not in path.split("/") and f"{place.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")


def _lies_below(path: Path, root: str) -> bool:
    return path.resolve().is_relative_to(Path(root).resolve())


def _said(roots: tuple[str, ...]) -> str:
    return ", ".join(roots) if roots else "nothing (the operator sets STIEFEL_READABLE and STIEFEL_WRITABLE)"
