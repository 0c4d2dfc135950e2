"""What a reference rule is: one plain weight W (m×n, `nn.Linear` layout), changed by its full gradient G = ∂L/∂W."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What a rule may know. One object for each matrix, since `heads` differs between them."""

    settings: Any  # the method's settings, rank and period filled in
    betas: tuple[float, float]
    epsilon: float
    decay: float  # λ, decoupled
    steps: int  # of the whole run
    hidden: int  # d, for every layer
    heads: int  # row blocks of m/heads rows each; 0 where the target has no heads
    frozen: bool = False  # a pretrained W stays under the factors


class Draws(Protocol):
    """The random numbers, given from outside so that both sides of a comparison have the same. `step` is 0-based."""

    def gaussian(self, step: int, rows: int, rank: int) -> Tensor:
        """golore: Z (rows×rank), whose Q is the basis from `step` on. flora, garare: the scaled basis itself."""
        ...

    def sketch(self, step: int, columns: int, width: int) -> Tensor:
        """Ω (columns×width) of the randomised subspace iteration."""
        ...

    def subset(self, step: int) -> Tensor:
        """gosare: the k flat positions (row-major), sorted."""
        ...

    def heads(self, step: int, count: int) -> list[int]:
        """galore_plus: the heads whose rows are stacked, in this order."""
        ...

    def initial(self, name: str) -> Tensor:
        """Start values: "B" (m×r), "A" (r×n); sltrain also "positions" (flat) and "values"."""
        ...

    def restart(self, step: int) -> Tensor:
        """relora: the new A (r×n) of the restart before `step`."""
        ...

    def kept(self, step: int, name: str, moment: str) -> Tensor:
        """relora: which entries of moment "m" or "v" of factor "A" or "B" survive the restart before `step`."""
        ...


class Rule:
    """One matrix under one method. `weight` is the effective weight: what the next forward pass must use."""

    def __init__(self, weight: Tensor, problem: Problem, draws: Draws) -> None:
        self.weight = weight.detach().clone()
        self.problem = problem
        self.draws = draws

    def update(self, gradient: Tensor, eta: float, step: int) -> None:
        """One step at rate η with the gradient at `weight`. `step` is 0-based; switches belong to it."""
        raise NotImplementedError
