"""Examples in rows, rows on ranks, and rows in which no example sees another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, RobertaConfig

from tests.trainer.finetune import made
from trainer.causal import check_causal
from trainer.errors import SpecError
from trainer.finetune.leakage import border_mask, needs_mask
from trainer.finetune.packing import deal, pack
from trainer.finetune.task import UNLEARNT, collate

# Models that transformers gives no borders by position_ids alone.
MASKED = {"opt"}
CPU = torch.device("cpu")


def test_rows_hold_every_example_once_and_no_more_than_fits() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 7, 100):
        lengths = draw.integers(1, 65, count).tolist()
        rows = pack(lengths, 64)
        assert sorted(place for row in rows for place in row) == list(range(count))
        sums = [sum(lengths[place] for place in row) for row in rows]
        assert max(sums) <= 64
        # First fit decreasing needs at most 11/9 of the fewest rows, and 6/9 more (Dósa 2007).
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) * 2 + 6 / 9
        assert all(a + b > 64 for a, b in zip(sorted(sums), sorted(sums)[1:], strict=False)) or len(rows) == 1


@pytest.mark.parametrize(("rows", "ranks", "most"), [(8, 2, 2), (5, 2, 2), (1, 3, 4), (9, 2, 1), (7, 1, 3), (12, 4, 3)])
def test_every_rank_has_as_many_micro_batches_and_every_row_is_dealt_once(rows: int, ranks: int, most: int) -> None:
    dealt = deal(list(range(rows)), ranks, most)
    counts = {len(batches) for batches in dealt}
    assert len(dealt) == ranks and len(counts) == 1
    assert counts == {-(-rows // (ranks * most))}
    assert sorted(row for batches in dealt for batch in batches for row in batch) == list(range(rows))
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_a_row_of_two_examples() -> None:
    one, two = (np.array([5, 6, 7]), np.array([0, 1, 1])), (np.array([8, 9]), np.array([0, 1]))
    found = collate([[one, two], [two]], packing=True)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    no = UNLEARNT
    assert found["labels"].tolist() == [[no, 6, 7, no, 9], [no, 9, no, no, no]]
    assert set(collate([[one]], packing=False)) == {"input_ids", "labels"}


def load(directory: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.model(directory, kind), dtype=dtype)


@pytest.mark.parametrize("kind", made.SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_transformers_keep_packed_examples_apart(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        assert needs_mask(load(tmp_path, kind, dtype).eval(), 96, CPU) == (kind in MASKED)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=330, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=330, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["bloom", "mamba"],
)
@torch.no_grad()
def test_a_model_in_which_examples_would_meet_is_refused(config: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(SpecError, match="dataset.packing: .* use packing false"):
        needs_mask(AutoModelForCausalLM.from_config(config).eval(), 96, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_encoder_is_no_causal_model_until_it_says_so(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    # As large as trained weights make it: what is drawn hardly attends at all.
    config.initializer_range = 0.5
    with pytest.raises(SpecError, match="model: in RobertaForCausalLM a token sees those that follow it"):
        check_causal(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), 96, CPU)
    config.is_decoder = True
    check_causal(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), 96, CPU)


@pytest.mark.parametrize("kind", made.SIZES)
@torch.no_grad()
def test_causal_models_are_found_causal(tmp_path: Path, kind: str) -> None:
    check_causal(load(tmp_path, kind).eval(), 96, CPU)


@torch.no_grad()
def test_a_model_that_forgets_to_begin_positions_anew_is_refused(tmp_path: Path) -> None:
    """Apart, but elsewhere: its positions count on."""
    model = load(tmp_path, "gpt2").eval()
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: embed(torch.arange(positions.shape[-1]).expand_as(positions))
    with pytest.raises(SpecError, match="other logits in a packed row than alone"):
        needs_mask(model, 96, CPU)


@pytest.mark.parametrize("kind", made.SIZES)
@torch.no_grad()
def test_logits_of_packed_examples_are_those_alone(tmp_path: Path, kind: str) -> None:
    model = load(tmp_path, kind).eval()
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(330, (length,), generator=generator).numpy() for length in (11, 1, 7, 20, 3)]
    marked = [(ids, np.ones_like(ids)) for ids in examples]
    rows = collate([marked[:3], marked[3:]], packing=True)
    mask = {"attention_mask": border_mask(rows["position_ids"])} if kind in MASKED else {}
    del rows["labels"]
    logits = model(**rows, **mask, use_cache=False).logits
    for number, (row, begin) in enumerate([(0, 0), (0, 11), (0, 12), (1, 0), (1, 20)]):
        alone = model(input_ids=torch.from_numpy(examples[number])[None], use_cache=False).logits[0]
        assert (logits[row, begin : begin + len(alone)] - alone).abs().max() < 2e-5
