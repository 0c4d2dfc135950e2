"""What a rank sends and holds, counted byte by byte on two ranks: reduced gradients, the model while it is put
together, a switch. See measure.py for how."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.distributed.case import spec
from tests.distributed.group import run_group
from trainer.methodconfig import entry_count

HIDDEN, FFN, RANK, WORLD = 96, 160, 12, 2
SIDES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, FFN)] * 3
# fp32 bytes of one matrix, and of those of one block.
LARGEST, BLOCK = 4 * HIDDEN * FFN, 4 * sum(m * n for m, n in SIDES)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": RANK, "period": 3},
    "gasare": {"name": "gasare", "period": 3},
    "garare": {"name": "garare", "rank": RANK, "period": 3},
    "lowrank": {"name": "lowrank", "rank": RANK},
}
# DeepSpeed keeps up to a thousand million gathered elements for their next use: all of a small model.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
Case = tuple[str, int, int, int]  # method, blocks, stage, micro-batches a step
SENT: list[Case] = [(method, 2, stage, 1) for method in METHODS for stage in (1, 2, 3)]
HELD: list[Case] = [
    (method, blocks, stage, micro_batches)
    for method in ("galore", "gasare")
    for blocks in (2, 6)
    for stage, micro_batches in ((3, 1), (3, 2), (1, 1))
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("bytes")
    for blocks in (2, 6):
        LlamaConfig(
            vocab_size=261, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=blocks, num_attention_heads=6
        ).save_pretrained(directory / f"blocks-{blocks}")
    wanted = list(dict.fromkeys(SENT + HELD))
    cases = []
    for method, blocks, stage, micro_batches in wanted:
        made = spec(
            directory,
            model={"path": str(directory / f"blocks-{blocks}"), "weights": "random"},
            tokenizer="bytes",
            method=METHODS[method],
            deepspeed={"zero_stage": stage, "persistence_threshold": 0},
            # Few activations, so that what is left is the method's.
            dataset={"sequence_length": 16},
            optimisation={"global_batch": 4, "micro_batch": 2 // micro_batches, "activation_checkpointing": True},
        )
        cases.append(
            {
                "directory": str(directory / f"{method}-{blocks}-{stage}-{micro_batches}"),
                "spec": made.model_dump(mode="json"),
                "steps": 3,
                "deepspeed": {"zero_optimization": NOTHING_KEPT} if stage == 3 else {},
            }
        )
    file = run_group(directory, WORLD, cases, "measure")
    ranks = [json.loads(file.with_suffix(f".rank{rank}").read_text()) for rank in range(WORLD)]
    # The rank that has most.
    return {
        case: {key: max(answers[index][key] for answers in ranks) for key in ranks[0][index] if key != "operations"}
        for index, case in enumerate(wanted)
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_of_a_target_s_gradient_no_more_is_reduced_than_its_core(
    measured: dict[Case, dict[str, Any]], stage: int
) -> None:
    """Full training reduces m·n numbers of a matrix, GaLore r·max(m, n): r/min(m, n) of it."""
    full = measured["full", 2, stage, 1]["reduced"]
    blocks = 2
    targets = 4 * blocks * sum(m * n for m, n in SIDES)
    cores = {
        "galore": sum(RANK * max(m, n) for m, n in SIDES),
        "gasare": sum(entry_count(0.25, m, n) for m, n in SIDES),
        # On the left: gate and up are ffn × hidden, down is hidden × ffn.
        "garare": RANK * (6 * HIDDEN + FFN),
        "lowrank": sum(RANK * (m + n) for m, n in SIDES),
    }
    for method, count in cores.items():
        reduced = measured[method, 2, stage, 1]["reduced"]
        # But for the norm, eight bytes or so a step, and shards padded to two elements.
        assert full - reduced == pytest.approx(targets - 4 * blocks * count, abs=64), method
    assert 4 * blocks * cores["galore"] / targets == RANK / HIDDEN


@pytest.mark.parametrize("method", ["galore", "gasare"])
def test_at_stage_3_no_rank_ever_holds_the_whole_model(measured: dict[Case, dict[str, Any]], method: str) -> None:
    whole = measured[method, 6, 1, 1]["assembling"]
    sharded = measured[method, 6, 3, 1]["assembling"]
    assert whole >= 4 * measured[method, 6, 1, 1]["parameters"]
    # Beside its share one module, whole: the largest is the embedding.
    assert sharded <= whole / WORLD + 2 * LARGEST < 0.6 * whole


@pytest.mark.parametrize(("stage", "micro_batches"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("method", ["galore", "gasare"])
def test_a_switch_holds_a_rank_s_gradient_of_one_matrix_and_with_accumulation_of_one_block(
    measured: dict[Case, dict[str, Any]], method: str, stage: int, micro_batches: int
) -> None:
    """However many blocks there are. One that waits for its decomposition, and the one that is being formed."""
    few, many = (measured[method, blocks, stage, micro_batches] for blocks in (2, 6))
    assert 0 < many["switching"] <= (2 * LARGEST if micro_batches == 1 else BLOCK + LARGEST)
    assert many["switching"] == few["switching"]


def test_at_stage_3_a_switch_gathers_no_more_than_a_step(measured: dict[Case, dict[str, Any]]) -> None:
    few, many = (measured["galore", blocks, 3, 1] for blocks in (2, 6))
    more = 4 * (many["parameters"] - few["parameters"])
    # Bases, 4·7·12·96 bytes a block, are sharded as weights are, and so are cores.
    assert many["gathered_at_a_switch"] - few["gathered_at_a_switch"] <= 1.3 * more / WORLD
