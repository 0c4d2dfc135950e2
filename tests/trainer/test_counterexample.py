"""GoLore's counterexample and theorem 5's instance, through the product's methods, layers and optimizer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counterexample import LARGE_BATCH, SETTINGS, Setting, curve, descend, draw, spec_of

pytestmark = pytest.mark.usefixtures("process_group")

SEED = 0
LARGE = f"large-batch GaLore ({LARGE_BATCH})"
# f − f* at which GaLore stalls. It depends on the seed, by what the last useful subspaces left undone; without B there
# are none, and all of f(X₀) = ½·6·(½σ)² stays.
STALLS = {"adam": (0.2, 10.0), "msgd": (0.2, 10.0), "no-b": (0.75 - 1e-9, 0.75 + 1e-9)}
# How many times lower the others end. Without B the run is twenty times shorter, and Adam's rate ten times higher:
# its last subspace, of steps of that size, leaves more.
LOWER = {"adam": 100, "msgd": 100, "no-b": 20}


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=pytest.mark.matrix) if key == "msgd" else key for key in SETTINGS]
)
def test_galore_stalls_where_the_others_converge(key: str) -> None:
    setting = SETTINGS[key]
    every = setting.steps // 40
    galore = [gap for _, gap in curve(setting, "GaLore", SEED, every)]
    low, high = STALLS[key]
    half = galore[len(galore) // 2 :]
    assert low < half[-1] < high
    assert max(half) - min(half) < 1e-9, "constant over the last half"
    for variant in (LARGE, "GoLore@50%"):
        assert curve(setting, variant, SEED, every)[-1][1] < half[-1] / LOWER[key], variant


def test_the_figure_is_a_png_and_an_svg_that_is_the_same_for_the_same_curves(tmp_path: Path) -> None:
    found = {
        "no-b": {variant: curve(SETTINGS["no-b"], variant, SEED, 100) for variant in ("full parameters", "GaLore")}
    }
    png, svg = draw(found, tmp_path / "one")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    assert draw(found, tmp_path / "two")[1].read_text() == svg.read_text()


class Theorem5(nn.Module):
    """f = ½L‖x₁‖², noise ξσ̃·diag(0, 1, 2, …, n−1), the first row of X₀ λpᵀ with p = e₁ and λ < σ̃/L."""

    L, NOISE, LAMBDA, SIZE = 2.0, 1.0, 0.3, 6

    def __init__(self) -> None:
        super().__init__()
        self.X = nn.Linear(self.SIZE, self.SIZE, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.X.weight.copy_(torch.randn(self.SIZE, self.SIZE, generator=torch.Generator().manual_seed(0)))
            self.X.weight[0] = 0.0
            self.X.weight[0, 0] = self.LAMBDA

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.X(torch.eye(self.SIZE, dtype=torch.float64)).T
        noise = self.NOISE * (torch.arange(self.SIZE) * x.diagonal()).sum()
        return SimpleNamespace(loss=0.5 * self.L * x[0].square().sum() + input_ids.double().mean() * noise)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "msgd"])
def test_theorem_5_galore_never_moves_the_first_row(optimizer: str, rank: int) -> None:
    """‖∇f‖² = L²λ² at every step, to the last bit, for any rank below n and any optimizer in the subspace."""
    method = {"name": "galore"}
    setting = Setting("theorem 5", optimizer, 0.05, 7, 60)
    spec = spec_of(method, setting, SEED)
    spec = spec.model_validate(spec.model_dump() | {"method": spec.method.model_dump() | {"rank": rank}})
    start = Theorem5().X.weight.detach().clone()
    for step, x in descend(Theorem5(), spec, SEED, 1):
        assert torch.equal(x[0], start[0]), step
    assert not torch.equal(x[1:], start[1:]), "everything else has moved"


def test_theorem_5_golore_does_move_it() -> None:
    setting = Setting("theorem 5", "adamw", 0.05, 7, 200)
    spec = spec_of({"name": "golore", "random_fraction": 1.0}, setting, SEED)
    last = [x for _, x in descend(Theorem5(), spec, SEED, 1)][-1]
    assert abs(float(last[0, 0])) < 1e-3 * Theorem5.LAMBDA
