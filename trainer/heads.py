"""A sequence classifier's head: what stands between the base model and the labels. It is always trained.

By rule: every parameter outside the base model (`score` of a LLaMA, `classifier` of a RoBERTa, `pooler` and
`classifier` of a DeBERTa), and the base model's own `pooler`, where it has one.
"""

from typing import Any

from torch import nn


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """By name, in the model's order. Raises ValueError for a model that has no part of its own called the base."""
    base = model.base_model
    if base is model:
        raise ValueError(f"{type(model).__name__} has no base model, and so no head, of its own")
    pooler = getattr(base, "pooler", None)
    inside = {id(parameter) for parameter in base.parameters()}
    inside -= {id(parameter) for parameter in pooler.parameters()} if isinstance(pooler, nn.Module) else set()
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}


def head_modules(model: Any) -> list[str]:
    """Names of the outermost modules that are all head."""
    head = {id(parameter) for parameter in head_parameters(model).values()}
    found: list[str] = []
    for name, module in model.named_modules():
        own = [id(parameter) for parameter in module.parameters()]
        if own and head.issuperset(own) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found
