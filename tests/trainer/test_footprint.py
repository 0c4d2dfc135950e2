"""The estimate of what a run takes: against live tensors, against a count by hand, and what must hold of any."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.live import peaks
from benchmarks.memory import settings_of
from tests.trainer.alone import make_run
from trainer.errors import SpecError
from trainer.footprint import CONTEXT, MARGIN, PROCESS, Footprint, Way, footprint
from trainer.presets import PRESETS

GIGA = 10**9


def of(method: str, model: str, way: Way) -> Footprint:
    return footprint(settings_of(method).resolved(model), PRESETS[model], 32000, way)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("full", {}),
        ("galore", {}),
        ("galore", {"zero_stage": 3}),
        ("galore", {"activation_checkpointing": True}),
        ("dora", {}),
        # Next to no activations: what is kept, buffers and the step alone.
        *[("full", {"sequence_length": 8, "dtype": "fp32", "zero_stage": stage}) for stage in (0, 1, 2, 3)],
        *[("full", {"sequence_length": 8, "zero_stage": stage}) for stage in (1, 2, 3)],
    ],
)
def test_what_is_estimated_is_near_to_what_lives(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    """The tensors; that is without what is assumed of a GPU's context and allocator."""
    way = replace(Way(micro_batch=8, sequence_length=128), **changes)

    def begin() -> Any:
        run, _ = make_run(
            tmp_path,
            model={"preset": "llama-1m", "vocabulary": 1000},
            dataset={"sequence_length": way.sequence_length, "validation_fraction": 0.05},
            method={"name": method},
            optimisation={
                "global_batch": 2 * way.micro_batch,
                "micro_batch": way.micro_batch,
                "dtype": way.dtype,
                "activation_checkpointing": way.activation_checkpointing,
            },
            deepspeed={"zero_stage": way.zero_stage},
        )
        return run

    measured = peaks(begin)
    estimated = footprint(settings_of(method).resolved("llama-1m"), PRESETS["llama-1m"], 1000, way).tensors
    assert 0.9 < estimated / max(measured.switching, measured.plain) < 1.3


def test_full_training_by_hand() -> None:
    """llama-1m in fp32 at stage 0, one sequence of 50 tokens, 1000 words."""
    d, ffn, layers, words, tokens = 128, 344, 5, 1000, 50
    parameters = layers * (4 * d * d + 3 * d * ffn + 2 * d) + d + 2 * words * d
    norm = 3 * 4 * d
    activations = tokens * (layers * (2 * norm + 4 * (4 * d + 4 * ffn)) + norm)
    found = footprint(
        settings_of("full"), PRESETS["llama-1m"], words, Way(dtype="fp32", zero_stage=0, sequence_length=tokens)
    )
    assert found.activations == activations
    assert found.logits == 12 * tokens * words
    # Weights, gradients and two moments; the gradients once more are more than activations and logits.
    assert activations + found.logits < 4 * parameters
    assert found.tensors == (4 + 4 + 8 + 4) * parameters
    assert found.device == round((1 + MARGIN) * found.tensors) + CONTEXT
    # While a checkpoint is written: weights and moments.
    assert found.host == PROCESS + 12 * parameters


def test_galore_trains_1b_where_full_training_does_not_fit() -> None:
    assert of("galore", "llama-1b", Way()).device < 24 * GIGA < of("full", "llama-1b", Way()).device


@pytest.mark.parametrize("method", ["full", "galore", "lora", "dora", "gasare"])
def test_each_way_to_save_memory_saves_it(method: str) -> None:
    usual = Way(micro_batch=8)
    plain = of(method, "llama-1b", usual)
    recomputing = of(method, "llama-1b", replace(usual, activation_checkpointing=True))
    offloaded = of(method, "llama-1b", replace(usual, offload="cpu"))
    several = of(method, "llama-1b", replace(usual, processes=8))
    assert recomputing.device < plain.device
    assert recomputing.host == plain.host
    assert offloaded.device < plain.device
    assert offloaded.host > plain.host
    assert several.device < plain.device


def test_logits_of_a_large_vocabulary_are_not_forgotten() -> None:
    settings = settings_of("loro").resolved("llama-60m")
    small, large = (footprint(settings, PRESETS["llama-60m"], v, Way(micro_batch=8)) for v in (32_000, 128_000))
    # In float32, with two temporaries of the same size.
    assert large.logits - small.logits == 12 * 8 * 1024 * 96_000
    assert large.device - small.device > large.logits - small.logits


def test_what_no_run_can_be_is_refused() -> None:
    with pytest.raises(SpecError, match="stage 0 with dtype bf16"):
        of("full", "llama-60m", Way(zero_stage=0))
