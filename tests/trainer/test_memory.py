"""What memory is counted: the papers' tables, the parameter counts, and the arithmetic of sharding."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.memory import (
    COLUMNS,
    DIFFERS,
    ROBERTA_RANKS,
    ROBERTA_TARGETS,
    published_tables,
    roberta_base,
    roberta_bytes,
    settings_of,
)
from trainer.errors import SpecError
from trainer.memory import Elements, Matrix, Memory, Model, Parts, elements, memory, model_of
from trainer.methodconfig import METHOD_CONFIGS, RankedSettings, TargetedSettings
from trainer.presets import PRESETS

TARGETS = ("q_proj", "k_proj", "gate_proj", "down_proj")
TALL, SQUARE, WIDE = Matrix("gate_proj", 24, 16, 3), Matrix("q_proj", 16, 16), Matrix("down_proj", 16, 24)
MODEL = Model((TALL, SQUARE, Matrix("k_proj", 8, 16), WIDE, Matrix("embed_tokens", 100, 16)), vectors=48)
MODEL_TARGETS = 3 * 24 * 16 + 16 * 16 + 8 * 16 + 16 * 24
EVERY = sorted(METHOD_CONFIGS)


def make(name: str, **changes: Any) -> Any:
    """Settings of a method for MODEL, rank 4 where it has one."""
    config = METHOD_CONFIGS[name]
    own: dict[str, Any] = {"targets": TARGETS} if issubclass(config, TargetedSettings) else {}
    own |= {"rank": 4} if issubclass(config, RankedSettings) else {}
    return settings_of(name, **(own | changes))


def of(matrix: Matrix, name: str, **changes: Any) -> Elements:
    """Elements of one matrix, the method's only target."""
    only = {} if name == "full" else {"targets": (matrix.name,)}
    return elements(make(name, **(only | changes)), Model((replace(matrix, count=1),)))


def rank_memory(name: str = "galore", **changes: Any) -> Memory:
    placed: dict[str, Any] = {"dtype": "fp32", "zero_stage": 2, "processes": 1} | changes
    return memory(make(name), MODEL, **placed)


# ------------------------------------------------------------------------------------------------------------ papers


def test_parameter_counts_are_the_published_ones() -> None:
    full = {"llama-60m": 58.07, "llama-130m": 134.11, "llama-350m": 367.97, "llama-1b": 1339.08}
    factorised = {"llama-60m": 42.77, "llama-130m": 94.00, "llama-350m": 185.22, "llama-1b": 609.31}
    for preset in COLUMNS:
        model = model_of(PRESETS[preset], 32000)
        assert round(model.parameters / 1e6, 2) == full[preset]
        assert round(elements(settings_of("lowrank").resolved(preset), model).trained / 1e6, 2) == factorised[preset]


def test_sparse_plus_low_rank_has_the_published_parameters() -> None:
    for preset, millions in zip(COLUMNS, (44, 97, 194, 646), strict=True):
        found = elements(settings_of("sltrain").resolved(preset), model_of(PRESETS[preset], 32000))
        assert round(found.trained / 1e6) == millions


def test_published_memory_agrees_to_the_printed_digit_but_for_five_entries() -> None:
    rows = published_tables()
    assert len(rows) == 40
    assert {(row.model, row.method) for row in rows if not row.agrees} == set(DIFFERS)


def test_the_five_entries_are_what_their_notes_say() -> None:
    for row in published_tables():
        gib = 1e9 / 2**30
        match row.model, row.method:
            case "llama-60m", "lowrank" | "loro":
                assert (row.published, f"{round(row.weights * gib, 2) + round(row.states * gib, 2):.2f}") == (
                    "0.24",
                ) * 2
            case "llama-60m", "lora" | "relora":
                assert (row.published, f"{round(row.weights, 2) + round(row.states * gib, 2):.2f}") == ("0.36",) * 2
            case "llama-350m", "galore":
                assert (row.published, row.computed) == ("1.59", "1.39")


def test_the_element_table_gives_the_closed_formulas() -> None:
    """Each formula typed once more, from sums over the matrices: embeddings, head and norms are `other`."""
    rows = {(row.model, row.method): row.weights + row.states for row in published_tables() if row.unit == "GB"}
    for preset, r in zip(COLUMNS, (128, 256, 256, 512), strict=True):
        shape = PRESETS[preset]
        sides = [*shape.target_sides().values()] * shape.layers
        other = 2 * 32000 * shape.hidden + (2 * shape.layers + 1) * shape.hidden
        n_all = other + sum(m * n for m, n in sides)
        f = sum(r * (m + n) for m, n in sides)
        nnz = sum(int(0.03 * m * n) for m, n in sides)
        smaller, larger = sum(r * min(side) for side in sides), sum(r * max(side) for side in sides)
        formulas = {
            "full": 6 * n_all,
            "lowrank": 6 * (other + f),
            "loro": 6 * (other + f),
            "lora": 2 * (n_all + other + f) + 4 * (other + f),
            "relora": 2 * (n_all + other + f) + 4 * (other + f),
            "galore": 2 * (n_all + 2 * other + smaller + 2 * larger),
            "sltrain": 6 * (other + f + nnz) + 8 * nnz,
        }
        for name, expected in formulas.items():
            assert rows[preset, name] * 1e9 == pytest.approx(expected, rel=1e-12), (preset, name)


def test_roberta_base_is_the_published_model() -> None:
    model = roberta_base()
    assert round(model.parameters / 1e6, 2) == 124.65
    targets = [m for m in model.matrices if m.name in ROBERTA_TARGETS]
    assert sum(m.rows * m.count for m in targets) == sum(m.columns * m.count for m in targets) == 82_944
    expected = {
        "garare": ("250.6", "254.6", "259.9"),
        "galore": ("251.0", "255.9", "262.6"),
        "lora": ("253.3", "265.2", "281.1"),
    }
    for name, megabytes in expected.items():
        assert tuple(f"{roberta_bytes(model, name, rank).total / 1e6:.1f}" for rank in ROBERTA_RANKS) == megabytes


# ---------------------------------------------------------------------------------------------------------- elements


def test_elements_of_one_matrix() -> None:
    mn, r = 24 * 16, 4
    core, basis, both = r * 24, r * 16, r * (24 + 16)
    subspace = Elements(frozen=mn, trained=core, core=core, basis=basis, moments=2 * core)
    assert of(TALL, "full") == Elements(trained=mn, moments=2 * mn)
    assert of(TALL, "full", optimizer="msgd") == Elements(trained=mn, moments=mn)
    # The same on both sides: the basis has the smaller side, whichever it is.
    for matrix in (TALL, WIDE):
        assert of(matrix, "galore") == of(matrix, "golore") == of(matrix, "galore_plus") == subspace
        assert of(matrix, "galore", optimizer="msgd") == replace(subspace, moments=core)
        assert of(matrix, "flora") == replace(subspace, basis=0)
    assert of(WIDE, "garare") == replace(subspace, basis=0)
    assert of(TALL, "garare") == Elements(frozen=mn, trained=r * 16, core=r * 16, moments=2 * r * 16)
    for name in ("gasare", "gosare"):
        assert of(TALL, name, density=0.3) == Elements(frozen=mn, trained=115, core=115, moments=230, index=115)
    assert of(TALL, "lowrank") == of(TALL, "loro") == Elements(trained=both, moments=2 * both)
    assert of(TALL, "lora") == of(TALL, "relora") == Elements(frozen=mn, trained=both, moments=2 * both)
    assert of(TALL, "dora") == Elements(frozen=mn, trained=both + 24, moments=2 * (both + 24))
    assert of(TALL, "sltrain") == Elements(trained=both + 11, moments=2 * (both + 11), index=11)


def test_galore_plus_is_right_on_heads_and_keeps_a_residual_there() -> None:
    grouped = Matrix("k_proj", 8, 16)
    plain = Elements(frozen=128, trained=32, core=32, basis=64, moments=64)
    assert of(grouped, "galore_plus", residual_density=0) == plain
    k = 12  # 10 % of 128
    residual = Elements(trained=2 * k, core=2 * k, index=k, residual=3 * k)
    assert of(grouped, "galore_plus", residual_density=0.1) == plain + residual
    assert of(grouped, "galore_plus", residual_density=1e-6).index == 1


def test_only_loro_of_a_pretrained_model_keeps_its_weights() -> None:
    for name in EVERY:
        pretrained = elements(make(name), replace(MODEL, pretrained=True))
        more = MODEL_TARGETS if name == "loro" else 0
        assert pretrained == elements(make(name), MODEL) + Elements(frozen=more)


def test_what_is_no_target_has_two_moments() -> None:
    plain = MODEL.parameters - 16 * 16
    one = of(SQUARE, "galore", optimizer="msgd") + Elements(trained=plain, moments=2 * plain)
    assert elements(make("galore", optimizer="msgd", targets=("q_proj",)), MODEL) == one
    # Full training's optimizer is of all matrices, and of no norm.
    assert elements(make("full", optimizer="msgd"), MODEL).moments == MODEL_TARGETS + 100 * 16 + 2 * 48


def test_a_tied_head_is_counted_once() -> None:
    shape = PRESETS["llama-tiny"]
    assert model_of(shape, 300).parameters - model_of(shape, 300, tied=True).parameters == 300 * shape.hidden


def test_a_missing_rank_one_too_large_and_an_unknown_target_are_refused() -> None:
    with pytest.raises(SpecError, match="method.rank: None"):
        elements(settings_of("galore", targets=("q_proj",)), MODEL)
    with pytest.raises(SpecError, match=r"rank 9 is above the smallest side of k_proj \(8×16\)"):
        elements(make("lora", rank=9), MODEL)
    with pytest.raises(SpecError, match="no matrix is called 'o_proj'"):
        elements(make("lora", targets=("q_proj", "o_proj")), MODEL)


# ------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", EVERY)
def test_each_stage_shards_what_it_should(name: str) -> None:
    found = elements(make(name), MODEL)
    for stage, first in ((1, ("masters", "moments")), (2, ("gradients",)), (3, ("weights", "basis"))):
        for dtype in ("fp32", "bf16"):
            alone = rank_memory(name, dtype=dtype, zero_stage=stage).device
            four = rank_memory(name, dtype=dtype, zero_stage=stage, processes=4).device
            for part in first:
                whole, share = getattr(alone, part), getattr(four, part)
                assert whole <= 4 * share < whole + 16, (stage, part)
            assert alone.buffers == four.buffers == 4 * found.residual
            assert (alone.weights == four.weights) == (stage < 3)
            assert (alone.gradients == four.gradients) == (stage < 2)


def test_bytes_of_each_part() -> None:
    found = elements(make("galore"), MODEL)
    weights, basis, trained, moments = found.frozen + found.trained, found.basis, found.trained, found.moments
    fp32, bf16 = rank_memory(zero_stage=0).device, rank_memory(dtype="bf16", zero_stage=1).device
    assert fp32 == Parts(4 * weights, 4 * basis, gradients=4 * trained, moments=4 * moments)
    assert bf16 == Parts(2 * weights, 2 * basis, gradients=2 * trained, masters=4 * trained, moments=4 * moments)
    # ZeRO has a master beside weights that are fp32 themselves.
    assert rank_memory(dtype="fp32", zero_stage=1).device.masters == 4 * trained
    assert rank_memory(dtype="bf16", zero_stage=2).device.gradients == 4 * found.trained


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_and_changes_nothing(name: str, stage: int) -> None:
    here = rank_memory(name, zero_stage=stage, processes=3, dtype="bf16")
    moved = rank_memory(name, zero_stage=stage, processes=3, dtype="bf16", offload="cpu")
    assert here.host.total == 0
    assert moved.device + moved.host == here.device
    assert moved.device.masters == moved.device.moments == 0
    assert moved.host.weights == moved.host.basis == moved.host.buffers == 0
    assert (moved.host.gradients > 0) == (stage >= 2)


def test_parameters_are_offloaded_beside_states() -> None:
    here = rank_memory("gasare", zero_stage=3, processes=3, dtype="bf16", merge="fp32")
    moved = rank_memory("gasare", zero_stage=3, processes=3, dtype="bf16", merge="fp32", offload_parameters="cpu")
    assert moved.device + moved.host == here.device
    assert (moved.host.weights, moved.host.basis) == (here.device.weights, here.device.basis)
    assert moved.device.weights == moved.device.basis == 0
    assert moved.device.masters == here.device.masters


@pytest.mark.parametrize("stage", [1, 3])
def test_a_copy_of_frozen_weights_is_sharded(stage: int) -> None:
    found = elements(make("galore"), MODEL)
    alone, four = (rank_memory(dtype="bf16", zero_stage=stage, merge="fp32", processes=n).device for n in (1, 4))
    assert alone.masters == 4 * (found.trained + found.frozen)
    assert alone.masters <= 4 * four.masters < alone.masters + 32


def test_stage_0_runs_in_fp32_without_offload_only() -> None:
    for changes in ({"dtype": "bf16"}, {"offload": "cpu"}, {"offload_parameters": "cpu"}):
        with pytest.raises(SpecError, match="zero_stage"):
            rank_memory(zero_stage=0, **changes)
    with pytest.raises(SpecError, match="processes"):
        rank_memory(processes=0)


@pytest.mark.parametrize("name", [n for n in EVERY if issubclass(METHOD_CONFIGS[n], RankedSettings)])
def test_a_higher_rank_takes_more(name: str) -> None:
    totals = [
        memory(make(name, rank=rank), MODEL, dtype="bf16", zero_stage=2, processes=2).device.total
        for rank in range(1, 9)
    ]
    assert totals == sorted(set(totals))


def test_counting_needs_no_torch() -> None:
    code = "import sys, trainer.memory, benchmarks.memory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
