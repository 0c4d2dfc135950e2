"""What must hold of subspaces and steps whatever the numbers are."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.decoder import VOCABULARY, decoder
from tests.reference.product import product_run
from tests.trainer.test_exact import CASES, spec_for
from trainer.batch import Batch
from trainer.engine import PlainEngine
from trainer.lowrank.adapted import whole_in_this_process
from trainer.lowrank.entries import EntriesLinear, largest_entries, random_entries
from trainer.lowrank.linalg import exact_basis, random_basis, randomized_basis
from trainer.lowrank.philox import gaussian, philox
from trainer.lowrank.projected import ProjectedLinear
from trainer.lowrank.riemannian import balanced, preconditioned, retracted
from trainer.lowrank.seeded import SeededLinear
from trainer.methods import make_method
from trainer.methods.base import Method, StepContext
from trainer.update import update
from trainer.zero import Shards


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_every_basis_is_orthonormal(shape: tuple[int, int]) -> None:
    matrix, generator = draw(*shape), torch.Generator().manual_seed(1)
    for basis in (
        exact_basis(matrix, 7),
        randomized_basis(matrix, 7, 4, 2, generator),
        random_basis(shape[0], 7, generator),
    ):
        assert basis.shape == (shape[0], 7)
        assert (basis.T @ basis - torch.eye(7)).abs().max() < 1e-12


LAYERS = {
    "left": lambda linear: ProjectedLinear(linear, "a", 3, "left"),
    "right": lambda linear: ProjectedLinear(linear, "a", 3, "right"),
    "seeded-left": lambda linear: SeededLinear(linear, "a", "left", 3, 0.3, False, 5, 1),
    "seeded-right": lambda linear: SeededLinear(linear, "a", "right", 3, 0.3, False, 5, 1),
    "entries": lambda linear: EntriesLinear(linear, "a", 0.3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_projecting_is_the_adjoint_of_embedding(kind: str) -> None:
    """⟨project(G), c⟩ = ⟨G, embed(c)⟩: what the core gets as its gradient is what its change is made of."""
    layer = LAYERS[kind](nn.Linear(8, 6, bias=False).double())
    if isinstance(layer, ProjectedLinear):
        tall = exact_basis(draw(6, 8) if kind == "left" else draw(8, 6), 3)
        layer.basis.data = tall if kind == "left" else tall.T.contiguous()
    if isinstance(layer, EntriesLinear):
        layer.positions.data.copy_(random_entries(48, layer.count, torch.Generator().manual_seed(2)))
    gradient, core = draw(6, 8, seed=3), draw(*layer.core.shape, seed=4)
    weight = layer.product(torch.eye(8, dtype=torch.float64)).T
    (projected,) = torch.autograd.grad(weight, layer.core, gradient)
    layer.core.data = core
    embedded = layer.change(whole_in_this_process)
    assert float((projected * core).sum()) == pytest.approx(float((gradient * embedded).sum()), rel=1e-12)


def test_random_bases_average_to_the_identity() -> None:
    """E[PPᵀ] = (r/m)·I, without any factor √(m/r). Entries of PPᵀ vary by less than 1/2 each; 5 standard errors."""
    m, r, draws = 12, 5, 4000
    generator = torch.Generator().manual_seed(0)
    bases = torch.stack([random_basis(m, r, generator) for _ in range(draws)])
    mean = (bases @ bases.mT).mean(dim=0)
    assert (mean - r / m * torch.eye(m)).abs().max() < 5 * 0.5 / draws**0.5


# A uniform basis fails this once in 5,000 seeds, for each of the two statistics.
FALSE_ALARM = 2e-4


def furthest_apart(one: Tensor, other: Tensor) -> float:
    """The two-sample Kolmogorov-Smirnov statistic."""
    points = torch.cat([one, other]).sort().values
    shares = [torch.searchsorted(s.sort().values, points, right=True) / len(s) for s in (one, other)]
    return float((shares[0] - shares[1]).abs().max())


def test_random_bases_are_as_likely_in_every_rotation() -> None:
    """Entries of P and of an independent U P V have the same distribution; those of a QR without sign fix have not."""
    m, r, draws = 8, 3, 4000
    generator = torch.Generator().manual_seed(1)
    u, v = torch.linalg.qr(draw(m, m, seed=5))[0], torch.linalg.qr(draw(r, r, seed=6))[0]
    limit = (-0.5 * torch.tensor(FALSE_ALARM / 2).log()).sqrt() * (2 / draws) ** 0.5
    plain = torch.stack([random_basis(m, r, generator) for _ in range(draws)])
    rotated = torch.stack([u @ random_basis(m, r, generator) @ v for _ in range(draws)])
    for row, column in ((0, 0), (m - 1, r - 1)):
        assert furthest_apart(plain[:, row, column], rotated[:, row, column]) < limit
    unfixed = torch.stack([torch.linalg.qr(draw(m, r, seed=9 + i))[0] for i in range(draws)])
    turned = torch.stack([u @ basis @ v for basis in unfixed])
    assert furthest_apart(unfixed[:, 0, 0], turned[:, 0, 0]) > limit


# -------------------------------------------------------------------------------------------------------------- seeds


def test_philox_gives_its_authors_numbers() -> None:
    """The known answers of Random123's philox4x32-10."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, answer in known:
        assert tuple(philox((torch.tensor([counter[0]]), *counter[1:]), key)[0].tolist()) == answer


def test_a_seeded_basis_is_made_again_bit_for_bit() -> None:
    cpu = torch.device("cpu")
    named = {"seed": 2**40 + 3, "stream": 4, "epoch": 5, "device": cpu}
    first = gaussian(70, 9, **named)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(gaussian(70, 9, **named), first)
    finally:
        torch.set_num_threads(threads)
    # A larger one begins with the same numbers: they depend on their place alone.
    assert torch.equal(gaussian(140, 9, **named)[:70], first)
    others = [named | {"seed": 3}, named | {"stream": 5}, named | {"epoch": 6}]
    assert not any(torch.equal(gaussian(70, 9, **other), first) for other in others)


def test_seeded_numbers_are_gaussian() -> None:
    """Kolmogorov-Smirnov against the normal distribution, false alarm 2e-4; mean, variance, kurtosis, correlation."""
    numbers = gaussian(2000, 100, seed=0, stream=0, epoch=0, device=torch.device("cpu")).double()
    flat = numbers.flatten()
    ordered, ranks = flat.sort().values, (torch.arange(len(flat)) + 0.5) / len(flat)
    distance = float((torch.special.ndtr(ordered) - ranks).abs().max())
    assert distance < (-0.5 * torch.tensor(FALSE_ALARM / 2).log()).sqrt() / len(flat) ** 0.5
    error = len(flat) ** -0.5
    assert abs(float(flat.mean())) < 4 * error
    assert abs(float(flat.var()) - 1) < 4 * 2**0.5 * error
    assert abs(float((flat**4).mean()) - 3) < 4 * 96**0.5 * error
    assert float((numbers.T @ numbers / 2000 - torch.eye(100)).abs().max()) < 5.5 * 2**0.5 / 2000**0.5


# ------------------------------------------------------------------------------------------------------------ entries


def test_the_largest_entries_are_exactly_k_also_among_equals() -> None:
    matrix = torch.tensor([[1.0, -3.0, 3.0], [3.0, 0.0, -1.0]])
    assert largest_entries(matrix, 2).tolist() == [1, 2]  # three have magnitude 3; the first two in the matrix
    assert largest_entries(matrix, 4).tolist() == [0, 1, 2, 3]
    assert largest_entries(torch.zeros(3, 4), 5).tolist() == [0, 1, 2, 3, 4]


def test_random_entries_are_k_different_ones_and_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_entries(30, 7, generator) for _ in range(6000)])
    assert all(len(set(row.tolist())) == 7 and row.tolist() == sorted(row.tolist()) for row in drawn[:100])
    shares = torch.bincount(drawn.flatten().long(), minlength=30) / 6000
    assert (shares - 7 / 30).abs().max() < 5 * (7 / 30 * 23 / 30 / 6000) ** 0.5


# --------------------------------------------------------------------------------------------------------------- LORO


def test_the_exact_step_is_the_retraction_of_the_projected_gradient() -> None:
    """With dB = G Aᵀ and dA = Bᵀ G: factors of SVD_r(W − η·(P_B G + G P_A − P_B G P_A)), balanced."""
    b, a, gradient, rate = draw(14, 4, seed=1), draw(4, 11, seed=2), draw(14, 11, seed=3), 0.3
    new_b, new_a, damped = retracted(b, a, gradient @ a.T, b.T @ gradient, rate)
    pb, pa = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    moved = b @ a - rate * (pb @ gradient + gradient @ pa - pb @ gradient @ pa)
    u, s, vh = torch.linalg.svd(moved)
    assert not damped
    assert (new_b @ new_a - u[:, :4] * s[:4] @ vh[:4]).abs().max() < 1e-10
    for factor in (new_b, new_a):
        assert (torch.linalg.svdvals(factor) - s[:4].sqrt()).abs().max() < 1e-10


def test_balancing_leaves_the_product() -> None:
    b, a = draw(9, 3, seed=1) * 10, draw(3, 7, seed=2)
    new_b, new_a = balanced(b, a)
    assert (new_b @ new_a - b @ a).abs().max() < 1e-12
    assert (torch.linalg.svdvals(new_b) - torch.linalg.svdvals(new_a)).abs().max() < 1e-12


@pytest.mark.parametrize("step", [retracted, preconditioned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nearly_singular_factor_is_damped_and_said_so(step: Any, dtype: torch.dtype) -> None:
    b, a, gradient = (x.to(dtype) for x in (draw(9, 3, seed=1), draw(3, 7, seed=2), draw(9, 7, seed=3)))
    for broken in (b * torch.tensor([1.0, 1.0, 1e-9], dtype=dtype), torch.zeros_like(b)):
        new_b, new_a, damped = step(broken, a, gradient @ a.T, broken.T @ gradient, 0.1)
        assert damped
        assert bool(torch.isfinite(new_b).all()) and bool(torch.isfinite(new_a).all())


# ------------------------------------------------------------------------------------------------------------ methods


SWITCHING = ["galore", "golore", "gasare", "gosare", "flora", "garare", "garare-pinv", "galore_plus", "relora"]


TOKENS = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))


def trained(directory: Path, case: str, steps: int, **optimisation: Any) -> tuple[nn.Module, Method, Shards]:
    """The small decoder after some steps of a method."""
    spec, model = spec_for(directory, case, **optimisation), decoder()
    method = make_method(spec)
    method.attach(model)
    engine = PlainEngine(spec, model, method)
    shards = Shards(engine)
    for step in range(steps):
        update(engine, method, shards, step, 0.01, [Batch.of_tokens(TOKENS)])
    return model, method, shards


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", SWITCHING)
def test_a_switch_leaves_the_loss_as_it_was(tmp_path: Path, case: str) -> None:
    form = {} if case == "relora" else {"form": "factored"}
    model, method, shards = trained(tmp_path, case, 6, **form)
    before = model(TOKENS, TOKENS).loss.item()
    old = copy.deepcopy(model.state_dict())
    report = method.before_step(StepContext(6, 0.01, model, shards, [Batch.of_tokens(TOKENS)]))
    assert report is not None and report.fallbacks == 0
    assert model(TOKENS, TOKENS).loss.item() == pytest.approx(before, abs=1e-12)
    frozen = [f"{layer.name}.weight" for layer in method.layers]
    assert all(not torch.equal(model.state_dict()[name], old[name]) for name in frozen)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", [case for case in SWITCHING if case != "relora"])
def test_a_merged_weight_is_the_effective_one_and_its_core_is_empty_between_steps(tmp_path: Path, case: str) -> None:
    _, method, _ = trained(tmp_path, case, 6, form="merged")
    for layer in method.layers:
        assert float(layer.core.detach().abs().max()) == 0.0 and layer.scale == 1.0
        assert torch.equal(layer.effective(whole_in_this_process), layer.weight.detach())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", CASES)
def test_linear_modules_of_the_effective_weights_are_the_same_function(tmp_path: Path, case: str) -> None:
    model, method, _ = trained(tmp_path, case, 5)
    before = model(TOKENS, TOKENS).loss.item()
    for layer in method.layers:
        plain = nn.Linear(layer.columns, layer.rows, bias=False).double()
        plain.weight.data, plain.bias = layer.effective(whole_in_this_process).detach(), layer.bias
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    assert model(TOKENS, TOKENS).loss.item() == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize("name", ["loro", "lowrank", "sltrain"])
def test_where_factors_replace_a_weight_nothing_of_its_size_is_left(tmp_path: Path, name: str) -> None:
    spec, model = spec_for(tmp_path, name), decoder()
    method = make_method(spec)
    method.attach(model)
    for layer in method.layers:
        whole = layer.rows * layer.columns
        held = [*layer.parameters(), *layer.buffers()]
        assert layer.weight is None
        assert max(tensor.numel() for tensor in held) < whole / 2


class OneMatrix(nn.Module):
    """A regression on one tall matrix called q_proj, as a model with one attention head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=12)
        self.q_proj = nn.Linear(8, 12, bias=False).double()

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.q_proj(input_ids) - input_ids.repeat(1, 2)[:, :12].sin()).square().mean())


@pytest.mark.usefixtures("process_group")
def test_galore_plus_with_one_head_and_no_residual_is_galore(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneMatrix()
    batches = [[draw(16, 8, seed=step)] for step in range(10)]
    found = []
    for name in ("galore", "galore_plus"):
        spec = spec_for(tmp_path, "galore")
        more = {"residual_density": 0.0, "head_targets": ["q_proj"]} if name == "galore_plus" else {}
        method = spec.method.model_dump() | {"name": name, "svd": "exact", "rank": 3, "targets": ["q_proj"]} | more
        wanted = spec.model_validate(spec.model_dump() | {"model": {"path": "x"}, "method": method})
        found.append(product_run(wanted, model, batches)[0]["q_proj.weight"])
    assert torch.equal(*found)
