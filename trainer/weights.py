"""Values for a structure without memory, one module at a time: drawn from the seed, or read from safetensors files.

So nobody ever holds a whole model who does not need one: what fills a module may shard it, or write it away, before the
next is filled.
"""

import json
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

_STEM = "model"
_SINGLE = f"{_STEM}.safetensors"
_INDEX = f"{_SINGLE}.index.json"


class Source(Protocol):
    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        """A value for each parameter of `module` itself in `names`: its name there → its name in the model."""


class Filler:
    """Gives each module of `model` its own parameters and rotary tables; those it has already stay.

    A parameter that several modules share is one afterwards too, and filled with the first of them.
    """

    def __init__(self, model: Any, source: Source) -> None:
        self._source = source
        self._name_of = {id(module): name for name, module in model.named_modules()}
        self._owner_of = _owners(model)
        self._sharers = _sharers(model)

    def fill(self, module: nn.Module) -> None:
        lacking = {k: p for k, p in module.named_parameters(recurse=False) if p.is_meta}
        if lacking:
            prefix = self._name_of[id(module)]
            names = {key: f"{prefix}.{key}" if prefix else key for key in lacking}
            values = self._source.values(module, names)
            for key, parameter in lacking.items():
                filled = nn.Parameter(values[key].to(parameter.dtype), requires_grad=parameter.requires_grad)
                for sharer, name in self._sharers[id(parameter)]:
                    setattr(sharer, name, filled)
        if hasattr(module, "original_inv_freq") and any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # The tables follow from the configuration; the call that draws parameters computes them.
            module.to_empty(device="cpu", recurse=False)
            self._owner_of[id(module)]._init_weights(module)


class Drawn:
    """Random values, as transformers initialises each kind of module; a function of the seed and the module's name.

    In float32, so that runs in another type start from the same weights, rounded.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self._owner_of, self._seed = _owners(model), seed

    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        saved = dict(module._parameters)
        for key in names:
            parameter = saved[key]
            assert parameter is not None
            module._parameters[key] = nn.Parameter(torch.empty(parameter.shape))
        with torch.random.fork_rng(devices=[]):
            # torch's generator of a CPU takes 32 bits of what it is given: the seed has to be mixed into them.
            torch.manual_seed(zlib.crc32(min(names.values()).encode(), (self._seed ^ self._seed >> 32) % 2**32))
            self._owner_of[id(module)]._init_weights(module)
        drawn = {key: module.get_parameter(key).detach() for key in names}
        module._parameters.update(saved)
        return drawn


class Stored:
    """The safetensors files of a Hugging Face directory: STEM.safetensors, or those that an index beside it names."""

    def __init__(self, directory: Path, stem: str = _STEM) -> None:
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, list[int]] = {}
        single = f"{stem}.safetensors"
        index = directory / f"{single}.index.json"
        files = _files_of(index) if index.is_file() else {single}
        for file in sorted(directory / name for name in files):
            if file.is_file():
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118  (not a dictionary: it has no iterator)
                        self._file_of[key] = file
                        self._shape_of[key] = opened.get_slice(key).get_shape()

    def has_all_of(self, model: nn.Module) -> bool:
        return not self.lacks(model)

    def lacks(self, model: nn.Module) -> set[str]:
        """Parameters that are not there, or in another shape."""
        # Each shared parameter once, under the name that comes first, which is the one that is written.
        return {name for name, p in model.named_parameters() if self._shape_of.get(name) != list(p.shape)}

    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        found = {}
        for key, name in names.items():
            with safe_open(self._file_of[name], framework="pt") as file:
                found[key] = file.get_tensor(name)
        return found


class Mixed:
    """`drawn` for the parameters called `new`, `stored` for all others."""

    def __init__(self, stored: Source, drawn: Source, new: set[str]) -> None:
        self._stored, self._drawn, self._new = stored, drawn, new

    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        new = {key: name for key, name in names.items() if name in self._new}
        old = {key: name for key, name in names.items() if name not in self._new}
        drawn = self._drawn.values(module, new) if new else {}
        return drawn | (self._stored.values(module, old) if old else {})


def directory_of(name: str, revision: dict[str, str]) -> Path:
    """Where the weights of a directory or a hub id lie on this machine, fetched first where they must be.

    Raises OSError where there are none.
    """
    if Path(name).is_dir():
        return Path(name)
    index = cached_file(name, _INDEX, **revision, _raise_exceptions_for_missing_entries=False)
    names = _files_of(Path(index)) if index else {_SINGLE}
    files = [cached_file(name, file, **revision, _raise_exceptions_for_missing_entries=False) for file in names]
    # Without safetensors the configuration's folder: it has no values, and transformers' loader is asked.
    found = next((file for file in files if file), None) or cached_file(name, "config.json", **revision)
    assert found is not None, "raised where there is none"
    return Path(found).parent


def _files_of(index: Path) -> set[str]:
    """The files that an index names. Raises ValueError for one that does not lie beside it."""
    names = set(json.loads(index.read_text())["weight_map"].values())
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
    return names


def without_values(model: nn.Module) -> None:
    """Make a structure of a model: its parameters go, its buffers stay."""
    for sharers in _sharers(model).values():
        parameter = sharers[0][0].get_parameter(sharers[0][1])
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for module, key in sharers:
            setattr(module, key, empty)


def _sharers(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each parameter all places where it stands."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, key))
    return found


def _owners(model: Any) -> dict[int, Any]:
    """The innermost transformers model around each module: its `_init_weights` is the module's."""
    owners: dict[int, Any] = {}

    def walk(module: nn.Module, owner: Any) -> None:
        inner = module if isinstance(module, PreTrainedModel) else owner
        owners[id(module)] = inner
        for child in module.children():
            walk(child, inner)

    walk(model, model)
    return owners
