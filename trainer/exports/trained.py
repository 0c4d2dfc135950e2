"""What a run has trained: the structure of its model without values, and the values of a checkpoint, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.place import Place, place_of
from trainer.checkpoint.reading import Checkpoint, Tensors, best, newest, read
from trainer.classify.labels import completed
from trainer.config import TrainingSpec
from trainer.errors import CheckpointError
from trainer.lowrank.adapted import Adapted
from trainer.methods import make_method
from trainer.model import structure
from trainer.modelconfig import DirectoryModel
from trainer.presets import ALL_LINEAR
from trainer.rundir import RunDir
from trainer.tokenizer import load_tokenizer


class Trained:
    """`model` is what was trained, its parameters on the meta device; `layers` are those that a method has put there.
    `from_export`: the run started from an export of another's, which need not be there any more.

    `plain` are the tensors of the model without them, by name and in its order, on the meta device: what stands for all
    values of a Hugging Face directory. A tensor of several names has its first; `aliases` has the others, by name.
    """

    def __init__(self, spec: TrainingSpec, rundir: RunDir, checkpoint: Checkpoint) -> None:
        spec = completed(spec, rundir)
        # The export that it started from may be gone.
        self.from_export = rundir.base.is_dir()
        if self.from_export:
            spec = spec.model_copy(update={"model": DirectoryModel(path=str(rundir.base))})
        self.spec, self.step = spec, checkpoint.step
        self.tokenizer = load_tokenizer(str(rundir.tokenizer))
        self.model, _ = structure(spec, self.tokenizer, values=False)
        self.plain, self.aliases = _each_once(self.model)
        method = make_method(spec)
        method.attach(self.model)
        method.load_state(checkpoint.method)
        self.layers: dict[str, Adapted] = {layer.name: layer for layer in method.layers}
        self.stored = Tensors(checkpoint)
        self.stored.restore_buffers(self.model)
        self._trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._name_of = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def is_trained(self, key: str) -> bool:
        """Whether the plain model's tensor `key`, which is no replaced weight matrix, was trained with the method."""
        return self.spec.optimisation.others != "frozen" or key in self._trained

    @property
    def targets(self) -> list[str]:
        """Names that mean the replaced layers and nothing else, here and to peft."""
        named = getattr(self.spec.method, "targets", ())
        by_last_part = named != (ALL_LINEAR,) and self.spec.task != "classify"
        return list(named) if by_last_part else list(self.layers)

    def layer_of(self, key: str) -> Adapted | None:
        """The layer whose weight matrix the plain model's tensor `key` is."""
        name, _, leaf = key.rpartition(".")
        return self.layers.get(name) if leaf == "weight" else None

    def merged(self, key: str) -> Tensor:
        """The value of the plain model's tensor `key`: W_eff (m, n) in float32 where a layer was replaced.

        Everything as the optimizer has it, in float32 where there is a master, whatever type the run computes in.
        """
        layer = self.layer_of(key)
        return self.stored.get(key) if layer is None else layer.effective(self._read)

    def _read(self, parameter: Any) -> Tensor:
        return self.stored.get(self._name_of[id(parameter)])


@contextmanager
def trained_by(rundir: RunDir, checkpoint: str = "newest") -> Iterator[Trained]:
    """`checkpoint` is newest, best (of the lowest held-out loss), or a step.

    Raises CheckpointError where the run has no such one, or not undamaged.
    """
    spec = TrainingSpec.model_validate_json(rundir.spec.read_text())
    place = place_of(spec, rundir)
    found = _choose(place, checkpoint, spec.checkpoints.url or str(rundir.checkpoints))
    try:
        yield Trained(spec, rundir, found)
    finally:
        place.release(found.step)


def _choose(place: Place, checkpoint: str, where: str) -> Checkpoint:
    steps = place.complete_steps()
    found = None
    if checkpoint == "newest":
        found = newest(place)
    elif steps and checkpoint == "best":
        found = best(place)
    elif checkpoint.isdecimal() and int(checkpoint) in steps:
        found = read(place, int(checkpoint))
    elif steps:
        has = ", ".join(map(str, steps))
        raise CheckpointError(f"--checkpoint: {where} has none of {checkpoint!r}; choose newest, best, or one of {has}")
    if found is None:
        raise CheckpointError(f"{where} holds no complete checkpoint; let the run reach its first one")
    return found


def _each_once(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    first: dict[int, str] = {}
    plain, aliases = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            plain[name] = torch.empty_like(tensor, device="meta", requires_grad=False)
        else:
            aliases[name] = first[id(tensor)]
    return plain, aliases
