"""Factors exported as factors and loaded again: the merged export's logits, and no matrix of a target's size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.finished import finished, logits_of
from tests.trainer.test_models import qwen_with_biases, tied_grouped_llama
from trainer.errors import CheckpointError, SpecError
from trainer.exports.export import export
from trainer.exports.loading import load_factored
from trainer.lowrank.factored import FactoredLinear

pytestmark = pytest.mark.usefixtures("process_group")

LORO = {"name": "loro", "rank": 4, "period": 3, "restart_warmup": 1}


@pytest.mark.parametrize("size", ["100KB", "5GB"])
@pytest.mark.parametrize("method", [LORO, {"name": "lowrank", "rank": 4}])
def test_the_factors_are_the_merged_model_s_function(tmp_path: Path, method: dict[str, Any], size: str) -> None:
    run, rundir, (before, after) = finished(tmp_path, method=method)
    assert after < before - 0.05
    factors, merged = tmp_path / "factors", tmp_path / "merged"
    assert export(rundir, factors, form="factored", shard_size=size) == 5
    export(rundir, merged)
    assert len(list(factors.glob("factored*.safetensors"))) == (1 if size == "5GB" else 2)
    ours, plain = load_factored(factors), AutoModelForCausalLM.from_pretrained(merged)
    expected = logits_of(run.model, run)
    assert (logits_of(ours, run) - expected).abs().max() < 1e-5
    assert (logits_of(plain, run) - expected).abs().max() < 1e-5

    prompt = AutoTokenizer.from_pretrained(factors)("3 times 4 is", return_tensors="pt").input_ids
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    assert torch.equal(ours.generate(prompt, **asked), plain.generate(prompt, **asked))

    layers = [module for module in ours.modules() if isinstance(module, FactoredLinear)]
    assert len(layers) == 7 * 2
    assert all(layer.B.shape == (layer.rows, 4) and layer.A.shape == (4, layer.columns) for layer in layers)
    saved = sum(layer.rows * layer.columns - 4 * (layer.rows + layer.columns) for layer in layers)
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in ours.parameters()) == saved


@pytest.mark.parametrize("make", [tied_grouped_llama, qwen_with_biases])
def test_tied_embeddings_and_biases_are_kept(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path / "model")
    model = {"path": str(tmp_path / "model"), "weights": "random"}
    run, rundir, _ = finished(tmp_path, model=model, tokenizer="bytes", method=LORO)
    export(rundir, tmp_path / "out", form="factored")
    loaded = load_factored(tmp_path / "out")
    assert (logits_of(loaded, run) - logits_of(run.model, run)).abs().max() < 1e-5
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == loaded.config.tie_word_embeddings


def test_the_type_can_be_chosen_when_it_is_written_and_when_it_is_loaded(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method=LORO)
    export(rundir, tmp_path / "out", form="factored", dtype="bf16")
    stated, wide = load_factored(tmp_path / "out"), load_factored(tmp_path / "out", torch.float32)
    assert {p.dtype for p in stated.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(p, wide.get_parameter(name).bfloat16()) for name, p in stated.named_parameters())


def test_factors_are_scaled_as_their_file_says(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method=LORO)
    out = tmp_path / "out"
    export(rundir, out, form="factored")
    once = [module for module in load_factored(out).modules() if isinstance(module, FactoredLinear)]
    facts = json.loads((out / "factors.json").read_text())
    (out / "factors.json").write_text(json.dumps(facts | {"scale": 2.0}))
    twice = [module for module in load_factored(out).modules() if isinstance(module, FactoredLinear)]
    for one, other in zip(once, twice, strict=True):
        x = torch.randn(3, one.columns)
        assert torch.allclose(2.0 * one(x), other(x), atol=1e-6)


def test_targets_that_are_more_than_factors_are_refused(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path / "galore", steps=1, method={"name": "galore", "rank": 4})
    with pytest.raises(SpecError, match="of a galore run are no product of two factors, only those of loro and lowra"):
        export(rundir, tmp_path / "out", form="factored")
    tied_grouped_llama().save_pretrained(tmp_path / "model")
    model = {"path": str(tmp_path / "model")}
    _, rundir, _ = finished(tmp_path / "loro", steps=1, model=model, tokenizer="bytes", method=LORO)
    with pytest.raises(SpecError, match="started from pretrained weights, which stay beside the factors"):
        export(rundir, tmp_path / "out", form="factored")
    assert not (tmp_path / "out").exists()


def test_transformers_does_not_take_the_factors_for_a_plain_model(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method=LORO)
    export(rundir, tmp_path / "out", form="factored")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_no_export_of_factors_is_refused(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method=LORO)
    out = tmp_path / "out"
    export(rundir, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is no export with --format factored"):
        load_factored(tmp_path / "merged")
    export(rundir, out, form="factored")
    facts = json.loads((out / "factors.json").read_text())
    (out / "factors.json").write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        load_factored(out)
    (out / "factors.json").write_text(json.dumps(facts | {"rank": 5}))
    with pytest.raises(CheckpointError, match="lack tensors of this model; export the run again"):
        load_factored(out)


def test_the_command_takes_every_choice(tmp_path: Path) -> None:
    _, rundir, _ = finished(tmp_path, steps=2, method=LORO)
    command = [sys.executable, "-m", "trainer", "export", str(rundir.root), str(tmp_path / "out"), "--json"]
    command += ["--format", "factored", "--checkpoint", "best", "--shard-size", "100KB", "--dtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"step": 2, "format": "factored", "path": str(tmp_path / "out")}
    assert {p.dtype for p in load_factored(tmp_path / "out").parameters()} == {torch.bfloat16}
    done = subprocess.run([*command, "--format", "gguf"], capture_output=True, text=True)
    assert done.returncode == 64
    assert "--format: 'gguf' is unknown; choose one of merged, peft, factored" in done.stderr
