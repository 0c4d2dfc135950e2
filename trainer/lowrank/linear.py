"""The layer that every low-rank method trains through.

    y = s·x Wᵀ + (x Aᵀ) Bᵀ        so that        W_eff = s·W + B A

W (m, n) is frozen, B is (m, r), A is (r, n). One of B and A may be a fixed *basis* and the other the trained *core*:
with the basis left (B = P fixed), ∂L/∂A = PᵀG, which is what GaLore feeds to Adam; with it right (A = Qᵀ fixed),
∂L/∂B = G Q. See docs/decisions/0001-reparameterised.md.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import SpecError
from trainer.lowrank.probe import Probe, capture

Side = Literal["left", "right"]


class LowRankLinear(nn.Module):
    """Takes the place of an nn.Linear. `weight` and `bias` are the linear's own parameters, not copies.

    `scale` is s, the decoupled weight decay that W has collected since it was last merged: W itself is written only
    at a switch. `name` is the module's name in the model. The side is stored, never read off a shape.
    """

    def __init__(self, linear: nn.Linear, name: str, rank: int, side: Side) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.bias = linear.bias
        self.B = nn.Parameter(linear.weight.new_zeros(rows, rank), requires_grad=side == "right")
        self.A = nn.Parameter(linear.weight.new_zeros(rank, columns), requires_grad=side == "left")
        self.name, self.side, self.rank = name, side, rank
        self.scale = 1.0
        self.probe: Probe | None = None

    @property
    def core(self) -> nn.Parameter:
        """The trained factor: A (r, n) when the basis is left, B (m, r) when it is right."""
        return self.A if self.side == "left" else self.B

    @property
    def basis(self) -> nn.Parameter:
        """The fixed factor: B = P (m, r) when left, A = Qᵀ (r, n) when right."""
        return self.B if self.side == "left" else self.A

    def forward(self, x: Tensor) -> Tensor:
        frozen = functional.linear(x, self.weight, self.bias if self.scale == 1.0 else None)
        if self.scale != 1.0:
            frozen = frozen * self.scale
            if self.bias is not None:
                frozen = frozen + self.bias
        y = frozen + functional.linear(functional.linear(x, self.A), self.B)
        return y if self.probe is None else capture(y, x, self.name, self.probe)


def replace_targets(model: nn.Module, targets: tuple[str, ...], rank: int) -> list[LowRankLinear]:
    """Put a LowRankLinear in the place of every nn.Linear whose name ends in one of `targets`.

    Returned in the model's order. Basis left when rows ≤ columns, as in the papers. Raises SpecError when a target
    matches nothing, shares its weight, or has a side below the rank.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]
    for target in targets:
        if not any(name.rpartition(".")[2] == target for name, _ in found):
            linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise SpecError(f"method.targets: no linear module is called {target!r}; this model has {linears}")
    names_of: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(parameter_name)
    layers = []
    for name, linear in found:
        if len(shared := names_of[id(linear.weight)]) > 1:
            raise SpecError(
                f"method.targets: {name} shares its weight with another module ({', '.join(shared)}), which would be "
                f"frozen and merged into; leave {name.rpartition('.')[2]!r} out"
            )
        rows, columns = linear.weight.shape
        if rank > min(rows, columns):
            raise SpecError(
                f"method.rank: rank {rank} is above the smallest side of {name} ({rows}×{columns}); "
                f"choose at most {min(rows, columns)}, or leave it out of method.targets"
            )
        layer = LowRankLinear(linear, name, rank, "left" if rows <= columns else "right")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    return layers
