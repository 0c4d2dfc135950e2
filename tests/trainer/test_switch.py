"""The change of subspace: what must not change, and what happens when a basis cannot be had."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.alone import make_run
from trainer import events
from trainer.lowrank import switch as switching
from trainer.lowrank.entries import EntriesLinear
from trainer.lowrank.probe import Give, each_gradient
from trainer.lowrank.projected import ProjectedLinear
from trainer.methods.galore import GaLore
from trainer.run import Run
from trainer.zero import shape_of

pytestmark = pytest.mark.usefixtures("process_group")

FORMS = ("merged", "factored")


def layers(run: Run) -> list[ProjectedLinear]:
    assert isinstance(run.method, GaLore)
    return run.method.layers


def full_gradients(run: Run, at_once: Any = "block") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(layer: Any, gradient: torch.Tensor | None) -> None:
        assert gradient is not None
        assert layer.name not in found
        found[layer.name] = gradient

    each_gradient(run.model, layers(run), run.task.micro_batches(0), at_once, keep)
    return found


def loss(run: Run) -> float:
    tokens = run.task.load(list(range(8)))
    with torch.no_grad():
        return float(run.model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_switch_leaves_the_loss_as_it_was(tmp_path: Path, stage: int) -> None:
    factored = {"weight_decay": 0.1, "form": "factored"}
    run, _ = make_run(tmp_path, deepspeed={"zero_stage": stage}, optimisation=factored)
    for _ in range(3):
        run.train_step(lambda: False)
    before = loss(run)
    assert any(layer.scale != 1.0 for layer in layers(run))

    def gradients(give: Give) -> None:
        for layer in layers(run):
            give(layer, torch.randn(layer.shape))

    assert isinstance(run.method, GaLore)
    switching.switch(layers(run), gradients, run.method.choose, run.shards, seed=0, step=3)
    assert loss(run) == pytest.approx(before, abs=2e-6)
    assert all(float(run.shards.read(layer.core).abs().max()) == 0.0 for layer in layers(run))


HEAVY = {"weight_decay": 0.9, "learning_rate": 0.5, "form": "factored"}


def test_decay_is_folded_into_w_when_it_has_grown_large(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, method={"period": 1}, optimisation=HEAVY)
    for _ in range(3):
        run.train_step(lambda: False)
    for layer in layers(run):
        layer.scale = 0.3
    before = loss(run)
    for layer in layers(run):
        layer.merge(run.shards, 0)
        assert layer.scale == 1.0
    assert loss(run) == pytest.approx(before, abs=2e-6)


def test_in_bf16_a_small_decay_is_not_lost_at_a_switch(tmp_path: Path) -> None:
    """Rounded at every switch, 0.9985·W would be W again: half a unit in the last place of bf16 is 2⁻⁹ = 0.00195."""
    run, _ = make_run(tmp_path, deepspeed={"zero_stage": 2}, optimisation={"dtype": "bf16"})
    layer = layers(run)[0]
    start = layer.effective(run.shards.read)
    for _ in range(10):
        layer.scale *= 1 - 1.5e-3
        layer.merge(run.shards, 0)
    kept = layer.effective(run.shards.read).norm() / start.norm()
    assert float(kept) == pytest.approx(0.9985**10, abs=1e-4)


@pytest.mark.parametrize(("accumulation", "at_once"), [(1, "block"), (2, "block"), (2, 1), (2, 5), (2, 100)])
def test_the_probe_sees_the_gradient_that_autograd_gives_a_plain_model(
    tmp_path: Path, accumulation: int, at_once: Any
) -> None:
    run, _ = make_run(
        tmp_path,
        method={"rank": 4},
        deepspeed={"zero_stage": 0},
        optimisation={"micro_batch": 8 // accumulation, "form": "factored"},
    )
    batches = run.task.micro_batches(0)
    assert len(batches) == accumulation
    seen = full_gradients(run, at_once)
    assert seen.keys() == {layer.name for layer in layers(run)}

    for layer in layers(run):
        layer.weight.requires_grad_(True)
    for batch in batches:
        (run.model(input_ids=batch.tokens, labels=batch.tokens).loss / accumulation).backward()
    for layer in layers(run):
        assert layer.weight.grad is not None
        assert (seen[layer.name] - layer.weight.grad).abs().max() < 1e-7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_probe_touches_no_gradient_of_a_parameter(tmp_path: Path, checkpointing: bool) -> None:
    run, _ = make_run(tmp_path, optimisation={"activation_checkpointing": checkpointing})
    run.model.train()
    full_gradients(run)
    assert all(p.grad is None for p in run.model.parameters())
    assert all(layer.probe is None for layer in layers(run))


def spoil(monkeypatch: pytest.MonkeyPatch, name_part: str, value: float) -> None:
    """Let the gradients that subspaces of some layers are chosen from have `value` in one entry."""
    choose_or_none = switching.choose_or_none

    def spoilt(choose: Any, layer: Any, gradient: torch.Tensor, generator: torch.Generator) -> Any:
        if name_part in layer.name:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return choose_or_none(choose, layer, gradient, generator)

    monkeypatch.setattr(switching, "choose_or_none", spoilt)


def subspace(run: Run, layer: Any) -> torch.Tensor:
    return layer.positions.detach().clone() if isinstance(layer, EntriesLinear) else run.shards.read(layer.basis)


def test_a_layer_that_is_called_twice_has_its_basis_from_the_sum_of_its_gradients(tmp_path: Path) -> None:
    """In the backward pass they come one after the other, so such a model is probed instead."""
    found = {}
    for form in FORMS:
        run, _ = make_run(tmp_path / form, optimisation={"form": form})
        first, second = run.model.model.layers[:2]
        second.mlp.gate_proj = first.mlp.gate_proj
        run.method.layers = [layer for layer in layers(run) if layer.name != "model.layers.1.mlp.gate_proj"]
        run.train_step(lambda: False)
        found[form] = {layer.name: layer.effective(run.shards.read) for layer in layers(run)}
    for name, weight in found["merged"].items():
        assert (weight - found["factored"][name]).abs().max() < 1e-6, name


FROM_GRADIENTS = {
    "galore": {"name": "galore", "rank": 12, "period": 2},
    "golore": {"name": "golore", "rank": 12, "period": 2, "random_fraction": 0.0},
    "galore_plus": {"name": "galore_plus", "rank": 12, "period": 2, "residual_warmup": 4},
    "gasare": {"name": "gasare", "period": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", FROM_GRADIENTS)
def test_a_gradient_that_is_not_finite_keeps_the_old_subspace_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, method: str, form: str
) -> None:
    run, found = make_run(tmp_path, method=FROM_GRADIENTS[method], optimisation={"form": form})
    run.train_step(lambda: False)
    run.train_step(lambda: False)
    before = {layer.name: subspace(run, layer) for layer in run.method.layers}
    spoil(monkeypatch, "q_proj", value)
    run.train_step(lambda: False)
    switched = [e for e in found if isinstance(e, events.Switched)]
    assert [e.fallbacks for e in switched] == [0, 2]
    for layer in run.method.layers:
        kept = torch.equal(subspace(run, layer), before[layer.name])
        assert kept == ("q_proj" in layer.name), layer.name


@pytest.mark.parametrize("form", FORMS)
def test_without_an_old_basis_a_random_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    run, found = make_run(tmp_path, optimisation={"form": form})
    spoil(monkeypatch, "", float("nan"))
    run.train_step(lambda: False)
    switched = next(e for e in found if isinstance(e, events.Switched))
    assert (switched.fallbacks, switched.energy_kept) == (14, None)
    for layer in layers(run):
        basis = run.shards.read(layer.basis)
        p = basis if layer.side == "left" else basis.T
        assert (p.T @ p - torch.eye(layer.rank)).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_decomposition_that_fails_keeps_the_old_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    run, found = make_run(tmp_path, method={"period": 1}, optimisation={"form": form})
    run.train_step(lambda: False)

    def fails(*_: Any) -> torch.Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(run.method, "choose", fails)
    run.train_step(lambda: False)
    assert [e.fallbacks for e in found if isinstance(e, events.Switched)] == [0, 14]


def test_a_rank_or_a_target_that_the_model_lacks_is_refused_with_its_name(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.errors import SpecError
    from trainer.lowrank.adapted import replace_targets

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
    )

    def unchanged(linear: torch.nn.Linear, name: str, index: int) -> Any:
        return linear

    with pytest.raises(SpecError, match=r"k_proj \(4×8\); choose at most 4"):
        replace_targets(model, ("q_proj", "k_proj"), unchanged, rank=6)
    with pytest.raises(SpecError, match=r"called 'c_attn'; this model has \['down_proj', 'gate_proj'"):
        replace_targets(model, ("c_attn",), unchanged)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    from trainer.errors import DivergenceError

    run, _ = make_run(tmp_path, method="full", optimisation={"learning_rate": 10.0, "warmup_steps": 0, "dtype": "bf16"})
    norm = next(p for n, p in run.model.named_parameters() if n.endswith("norm.weight"))
    run.shards.write(norm, torch.full(shape_of(norm), float("nan")))
    with pytest.raises(DivergenceError, match="lower optimisation.learning_rate"):
        run.train_step(lambda: False)


def test_a_held_out_loss_whose_perplexity_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    from trainer.errors import DivergenceError

    run, found = make_run(tmp_path, method="full")
    head = run.model.get_parameter("lm_head.weight")
    run.shards.write(head, 1e6 * run.shards.read(head))
    with pytest.raises(DivergenceError, match="held-out loss"):
        run.evaluate()
    assert not any(isinstance(e, events.Evaluated) for e in found)
