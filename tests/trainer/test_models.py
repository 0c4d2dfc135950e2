"""Hugging Face models from a directory: trained, checkpointed, exported, and loaded again with the same loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.trainer.alone import make_run
from tests.trainer.finished import loss_of
from trainer import events
from trainer.errors import SpecError
from trainer.exports.export import export
from trainer.run import Run
from trainer.rundir import RunDir

pytestmark = pytest.mark.usefixtures("process_group")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tied_grouped_llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True))


def qwen_with_biases() -> torch.nn.Module:
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=4, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def finish(run: Run) -> None:
    while run.step < 5:
        run.train_step(lambda: False)
    run.evaluate()
    run.save()


@pytest.mark.parametrize("make", [tied_grouped_llama, qwen_with_biases])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_directory_is_trained_and_exported(tmp_path: Path, make: Any, stage: int) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    run, found = make_run(
        tmp_path,
        model={"path": str(tmp_path / "model")},
        tokenizer="bytes",
        method={"rank": 4},
        deepspeed={"zero_stage": stage},
        optimisation={"weight_decay": 0.1},
    )
    run.evaluate()
    (before,) = [e for e in found if isinstance(e, events.Evaluated)]
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert before.loss == pytest.approx(loss_of(original, run), abs=1e-5)
    finish(run)
    rundir = RunDir(tmp_path / "run")
    rundir.spec.write_text(run.spec.model_dump_json())
    assert export(rundir, tmp_path / "out") == 5
    after = [e for e in found if isinstance(e, events.Evaluated)][-1]
    assert after.loss < before.loss - 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(merged) is type(original)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    assert loss_of(merged, run) == pytest.approx(after.loss, abs=1e-5)


def test_a_directory_s_shape_alone_can_be_used(tmp_path: Path) -> None:
    tied_grouped_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    run, _ = make_run(
        tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "model"), "weights": "random"}, method={"rank": 4}
    )
    run.train_step(lambda: False)
    with pytest.raises(SpecError, match="cannot be loaded"):
        make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "model")}, method={"rank": 4})


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 100})).save_pretrained(tmp_path / "few")
    with pytest.raises(SpecError, match="100 embedding rows are too few for a tokeniser of 257"):
        make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "few")}, method={"rank": 4})
    LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=16)).save_pretrained(tmp_path / "short")
    with pytest.raises(SpecError, match="sequence_length: 32 is above the 16 tokens"):
        make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "short")}, method={"rank": 4})
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SpecError, match="no linear module is called 'q_proj'"):
        make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "gpt2")}, method={"rank": 4})
    run, _ = make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "gpt2")}, method="full")
    run.train_step(lambda: False)


def test_weights_that_lack_something_are_refused_and_not_drawn(tmp_path: Path) -> None:
    """Without its output embedding: a base model's own weights."""
    LlamaModel(LlamaConfig(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    with pytest.raises(SpecError, match=r"model: its weights lack lm_head\.weight"):
        make_run(tmp_path, tokenizer="bytes", model={"path": str(tmp_path / "base")}, method={"rank": 4})
    LlamaModel(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    make_run(tmp_path / "tied_run", tokenizer="bytes", model={"path": str(tmp_path / "tied")}, method={"rank": 4})


def test_a_target_that_shares_its_weight_is_refused(tmp_path: Path) -> None:
    tied_grouped_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(SpecError, match="lm_head shares its weight"):
        make_run(
            tmp_path,
            tokenizer="bytes",
            model={"path": str(tmp_path / "model")},
            method={"rank": 4, "targets": ["q_proj", "lm_head"]},
        )


def test_a_pretrained_model_keeps_its_own_tokeniser() -> None:
    from trainer.config import TrainingSpec

    rest = {"dataset": "python-stdlib", "method": "full", "optimisation": {"steps": 1}}
    kept = {
        "/models/x": TrainingSpec.model_validate(rest | {"model": {"path": "/models/x"}}).tokenizer,
        "org/x": TrainingSpec.model_validate(rest | {"model": {"hub": "org/x"}}).tokenizer,
        "bytes": TrainingSpec.model_validate(rest | {"model": "llama-1m"}).tokenizer,
    }
    assert all(expected == found for expected, found in kept.items())


def test_bf16_rounds_parameters_and_not_the_rotary_table(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, optimisation={"dtype": "bf16"}, method={"rank": 4})
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    tables = [b for name, b in run.model.named_buffers() if name.endswith("inv_freq")]
    assert tables
    assert all(table.dtype == torch.float32 for table in tables)
