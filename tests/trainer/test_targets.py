"""Which modules `all-linear` means, and what becomes of all that is no target."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
)

from tests.trainer.alone import alone, make_run
from tests.trainer.finished import finished, logits_of
from tests.trainer.test_models import SMALL, qwen_with_biases, tied_grouped_llama
from trainer.errors import SpecError
from trainer.exports.export import export
from trainer.exports.loading import load_factored
from trainer.heads import head_parameters
from trainer.lowrank.targets import target_linears
from trainer.memory import Matrix, Model, elements
from trainer.methodconfig import METHOD_CONFIGS
from trainer.methods import make_method
from trainer.presets import LLAMA_TARGETS

pytestmark = pytest.mark.usefixtures("process_group")

ALL = ("all-linear",)
CONFIGS = [LlamaConfig, RobertaConfig, BertConfig, DebertaV2Config]


def classifier(config: Any) -> Any:
    return AutoModelForSequenceClassification.from_config(config(**SMALL, pad_token_id=0))


def test_of_a_llama_they_are_the_seven_that_a_preset_has() -> None:
    for model in (tied_grouped_llama(), classifier(LlamaConfig)):
        names = [name for name, _ in target_linears(model, ALL)]
        assert names == [name for name, _ in target_linears(model, LLAMA_TARGETS)]
        assert len(names) == 7 * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_head_is_never_among_them_and_always_trained(config: Any, tmp_path: Path) -> None:
    model = classifier(config)
    names = [name for name, _ in target_linears(model, ALL)]
    assert len(names) % SMALL["num_hidden_layers"] == 0
    assert all(".layer.0." in name or ".layer.1." in name or ".layers." in name for name in names)
    head = head_parameters(model)
    assert {name.split(".")[0] for name in head} <= {"score", "classifier", "pooler", "bert"}
    assert not {f"{name}.weight" for name in names} & set(head)


def test_a_model_without_linear_maps_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    for targets in (ALL, ("c_attn",)):
        with pytest.raises(SpecError, match="Conv1D.*choose method full, or a model of linear modules"):
            target_linears(model, targets)


@pytest.mark.parametrize("name", METHOD_CONFIGS)
@pytest.mark.parametrize("make", [tied_grouped_llama, qwen_with_biases])
def test_frozen_is_all_that_the_method_does_not_replace(tmp_path: Path, name: str, make: Any) -> None:
    """And the calculator counts it so."""
    if name == "full":
        return
    model = make()
    rank = {} if name in ("gasare", "gosare") else {"rank": 4}
    spec = alone(
        tmp_path, method={"name": name, "targets": ALL, **rank}, optimisation={"others": "frozen", "steps": 2000}
    )
    method = make_method(spec)
    method.attach(model)
    ours = {id(p) for layer in method.layers for p in layer.trained()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == ours
    grouped = [p for group in method.parameter_groups(model) for p in group["params"]]
    assert {id(p) for p in grouped} == ours
    plain = make()
    block = {n: m for n, m in plain.named_modules() if n in {layer.name for layer in method.layers}}
    matrices = tuple(Matrix(n.rpartition(".")[2], *m.weight.shape) for n, m in block.items())
    rest = sum(p.numel() for p in plain.parameters()) - sum(m.rows * m.columns for m in matrices)
    counted = elements(spec.method, Model(matrices, vectors=rest), beside="frozen")
    assert counted.trained == sum(p.numel() for p in trained)
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert counted.frozen + counted.basis + counted.index == fixed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["galore", "galore_plus", "loro", "relora"])
def test_a_run_with_frozen_others_leaves_them_and_is_resumed_to_the_bit(tmp_path: Path, name: str, stage: int) -> None:
    torch.manual_seed(0)
    qwen_with_biases().save_pretrained(tmp_path / "model")
    extra = {"residual_warmup": 2} if name == "galore_plus" else {"restart_warmup": 1} if name != "galore" else {}
    changes: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model")},
        "tokenizer": "bytes",
        "method": {"name": name, "rank": 4, "period": 3, "targets": "all-linear"} | extra,
        "deepspeed": {"zero_stage": stage},
        # Recomputing needs no gradient of the embeddings.
        "optimisation": {"others": "frozen", "activation_checkpointing": True},
    }
    run, _ = make_run(tmp_path, **changes)
    for _ in range(4):
        run.train_step(lambda: False)
    run.save()
    again, _ = make_run(tmp_path, **changes)
    assert again.step == 4
    for one in (run, again):
        one.train_step(lambda: False)
        one.train_step(lambda: False)
    for mine, other in zip(run.method.layers, again.method.layers, strict=True):
        assert torch.equal(mine.effective(run.shards.read), other.effective(again.shards.read))
    assert run.shards.state_bytes() == again.shards.state_bytes()
    started = run.started()
    assert started.optimizer_state_bytes <= 8 * started.trained_parameters
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    kept = {n: p for n, p in run.model.named_parameters() if n in original and not p.requires_grad}
    assert "model.embed_tokens.weight" in kept and "lm_head.weight" in kept
    for n, p in kept.items():
        if not any(n == f"{layer.name}.weight" for layer in run.method.layers):
            assert torch.equal(run.shards.read(p), original[n])


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_is_then_nothing_but_factors(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    qwen_with_biases().save_pretrained(tmp_path / "model")
    run, rundir, _ = finished(
        tmp_path,
        model={"path": str(tmp_path / "model")},
        tokenizer="bytes",
        method={"name": name, "rank": 4, "targets": "all-linear"},
        optimisation={"others": "frozen"},
    )
    export(rundir, tmp_path / "out", form="peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    assert adapted.peft_config["default"].modules_to_save is None
    assert adapted.peft_config["default"].bias == "none"
    expected = logits_of(run.model, run)
    assert (logits_of(adapted, run) - expected).abs().max() < 1e-5


def test_factors_of_all_linear_modules_are_exported_and_loaded(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    run, rundir, _ = finished(
        tmp_path,
        model={"path": str(tmp_path / "model"), "weights": "random"},
        tokenizer="bytes",
        method={"name": "lowrank", "rank": 4, "targets": "all-linear"},
    )
    export(rundir, tmp_path / "out", form="factored")
    assert (logits_of(load_factored(tmp_path / "out"), run) - logits_of(run.model, run)).abs().max() < 1e-5


def test_of_another_family_galore_plus_finds_the_queries_and_keys(tmp_path: Path) -> None:
    spec = alone(tmp_path, method={"name": "galore_plus", "rank": 4, "targets": ALL, "residual_warmup": 2})
    method = make_method(spec)
    model = classifier(RobertaConfig)
    method.attach(model)
    heads = {layer.name.rpartition(".")[2] for layer in method.layers if method.has_heads(layer.name)}  # type: ignore[attr-defined]
    assert heads == {"query", "key"}
    spec = alone(
        tmp_path,
        method={"name": "galore_plus", "rank": 4, "targets": ALL, "residual_warmup": 2, "head_targets": ["q_prj"]},
    )
    with pytest.raises(SpecError, match="'q_prj' is no linear module"):
        make_method(spec).attach(classifier(RobertaConfig))
