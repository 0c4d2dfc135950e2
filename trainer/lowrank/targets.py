"""Which linear modules of a model a low-rank method replaces.

By name, or `all-linear`: every nn.Linear inside the repeated blocks (the nn.ModuleLists) of the base model. So neither
the output embedding nor a classification head is among them, nor a pooler; for a LLaMA they are the seven of
LLAMA_TARGETS.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.errors import SpecError
from trainer.presets import ALL_LINEAR


def target_linears(
    model: nn.Module, targets: tuple[str, ...], besides: Collection[int] = ()
) -> list[tuple[str, nn.Linear]]:
    """(name, linear) in the model's order. Raises SpecError where a target matches nothing.

    `besides`: identities of parameters that are nobody's target, whatever their names.
    """
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in besides
    ]
    if targets == (ALL_LINEAR,):
        inside = _in_blocks(model)
        found = [(name, module) for name, module in linears if id(module) in inside]
        if not found:
            raise SpecError(f"method.targets: this model has no linear module in repeated blocks{_instead(model)}")
        return found
    for target in targets:
        if not any(is_called(name, target) for name, _ in linears):
            known = sorted({name.rpartition(".")[2] for name, _ in linears})
            raise SpecError(
                f"method.targets: no linear module is called {target!r}; this model has {known}{_instead(model)}"
            )
    return [(name, module) for name, module in linears if any(is_called(name, target) for target in targets)]


def is_called(name: str, target: str) -> bool:
    """By the last part of the name, by its last parts, or by the whole."""
    return name == target or name.endswith(f".{target}")


def _in_blocks(model: nn.Module) -> set[int]:
    base: Any = getattr(model, "base_model", model)
    blocks = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return {id(inner) for block in blocks for inner in block.modules()}


def _instead(model: nn.Module) -> str:
    """What to do with a model whose maps are no linear modules."""
    maps = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Conv1D)})
    if not maps:
        return ""
    return (
        f"; its maps ({', '.join(maps)}) are Conv1D, which keep their weights transposed and which no low-rank method "
        "here replaces: choose method full, or a model of linear modules"
    )
