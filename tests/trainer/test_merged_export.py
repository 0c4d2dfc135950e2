"""The merged export: loaded by transformers it is what was trained; laid out as transformers would; never whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.trainer.finished import finished, loss_of
from tests.trainer.test_models import SMALL, tied_grouped_llama
from trainer.errors import CheckpointError, SpecError
from trainer.exports import shards
from trainer.exports.export import export
from trainer.methodconfig import METHOD_CONFIGS
from trainer.methods import METHODS
from trainer.rundir import RunDir

pytestmark = pytest.mark.usefixtures("process_group")

GALORE = {"name": "galore", "rank": 4, "period": 3}
DECAY = {"weight_decay": 0.1}


def settings(name: str) -> dict[str, Any]:
    """Small, and with everything the method has in use within five steps."""
    small = {"rank": 4, "period": 2, "restart_warmup": 1, "random_fraction": 0.5}
    small |= {"density": 0.1, "residual_density": 0.1, "residual_warmup": 2}
    fields = METHOD_CONFIGS[name].model_fields
    return {"name": name} | {key: value for key, value in small.items() if key in fields}


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_loss_it_was_trained_to(tmp_path: Path, name: str, stage: int) -> None:
    changes = {"method": settings(name), "optimisation": DECAY, "deepspeed": {"zero_stage": stage}}
    run, rundir, (before, after) = finished(tmp_path, **changes)
    assert after < before - 0.05
    assert export(rundir, tmp_path / "out", shard_size="200KB") == 5
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert loss_of(load(tmp_path / "out"), run) == pytest.approx(after, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("naïve π").input_ids) == "naïve π"


@pytest.mark.parametrize("method", [settings("dora"), settings("loro") | {"scale": 8.0}])
def test_fine_tuned_it_has_the_loss_too(tmp_path: Path, method: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tied_grouped_llama().save_pretrained(tmp_path / "model")
    changes = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes", "method": method}
    run, rundir, (before, after) = finished(tmp_path, **changes)
    assert after < before - 0.05
    export(rundir, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert loss_of(merged, run) == pytest.approx(after, abs=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {key for key in file.keys() if "lm_head" in key or "embed" in key} == {"model.embed_tokens.weight"}  # noqa: SIM118


@pytest.mark.parametrize("size", ["50KB", "5GB"])
def test_it_is_laid_out_as_transformers_lays_a_model_out(tmp_path: Path, size: str) -> None:
    _, rundir, _ = finished(tmp_path, steps=1, method=GALORE)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export(rundir, ours, shard_size=size)
    # One that was loaded would be written in the order of the files' names.
    anew = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ours))
    anew.load_state_dict(load(ours).state_dict())
    anew.save_pretrained(theirs, max_shard_size=size)
    tokenizer = {path.name for path in ours.iterdir() if "token" in path.name}
    assert {path.name for path in ours.iterdir()} - tokenizer == {path.name for path in theirs.iterdir()}
    for path in theirs.iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((ours / path.name).read_text()), path.name
        else:
            expected, found = load_file(path), load_file(ours / path.name)
            assert list(expected) == list(found)
            assert all(torch.equal(expected[key], found[key]) for key in expected)
            # The embeddings are larger than the smaller limit, and nothing else is.
            too_large = size == "50KB" and sum(tensor.nbytes for tensor in found.values()) > 50_000
            assert not too_large or list(found) in (["model.embed_tokens.weight"], ["lm_head.weight"])


def test_a_model_that_is_only_made_whole_is_exported(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model.save_pretrained(tmp_path / "model")
    changes = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes", "method": {"name": "full"}}
    run, rundir, (before, after) = finished(tmp_path, **changes)
    assert after < before - 0.05
    export(rundir, tmp_path / "out", shard_size="10KB")
    assert loss_of(load(tmp_path / "out"), run) == pytest.approx(after, abs=1e-5)


def test_a_model_that_is_stored_otherwise_than_computed_is_exported(tmp_path: Path) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    )
    model.save_pretrained(tmp_path / "model")
    attention = settings("galore") | {"targets": ["q_proj", "v_proj"]}
    changes = {"model": {"path": str(tmp_path / "model")}, "tokenizer": "bytes", "method": attention}
    run, rundir, (before, after) = finished(tmp_path, **changes)
    assert after < before - 0.05
    export(rundir, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in set(file.keys())
    assert loss_of(load(tmp_path / "out"), run) == pytest.approx(after, abs=1e-5)


def test_a_bf16_run_is_bf16_unless_its_masters_are_wanted(tmp_path: Path) -> None:
    changes = {"method": GALORE, "optimisation": {"dtype": "bf16"}}
    run, rundir, (_, after) = finished(tmp_path, **changes)
    export(rundir, tmp_path / "out")
    rounded = load(tmp_path / "out")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loss_of(rounded, run) == pytest.approx(after, abs=2e-2)
    export(rundir, tmp_path / "wide", dtype="fp32")
    wide = load(tmp_path / "wide")
    assert loss_of(wide, run) == pytest.approx(after, abs=2e-2)
    for name, value in wide.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value.bfloat16(), rounded.get_parameter(name)), name
    assert not torch.equal(wide.lm_head.weight, wide.lm_head.weight.bfloat16().float())


@pytest.fixture
def several(tmp_path: Path) -> RunDir:
    """Checkpoints of steps 1 to 3, the second with the lowest loss."""
    run, rundir, _ = finished(tmp_path, steps=0, method=GALORE, checkpoints={"keep": 9})
    for loss in (5.0, 3.0, 4.0):
        run.train_step(lambda: False)
        run.save(loss)
    return rundir


def test_which_checkpoint_can_be_chosen(tmp_path: Path, several: RunDir) -> None:
    chosen = {which: export(several, tmp_path / which, checkpoint=which) for which in ("newest", "best", "1")}
    assert chosen == {"newest": 3, "best": 2, "1": 1}
    heads = {which: load(tmp_path / which).lm_head.weight for which in chosen}
    assert not torch.equal(heads["newest"], heads["best"]) and not torch.equal(heads["best"], heads["1"])
    with pytest.raises(CheckpointError, match="none of '7'; choose newest, best, or one of 0, 1, 2, 3"):
        export(several, tmp_path / "out", checkpoint="7")


@pytest.mark.parametrize("size", ["0GB", "5", "large"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, several: RunDir, size: str) -> None:
    with pytest.raises(SpecError, match=f"--shard-size: '{size}' is no size"):
        export(several, tmp_path / "out", shard_size=size)


def test_what_is_there_already_is_left_alone(tmp_path: Path, several: RunDir) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(SpecError, match="not an empty directory; remove it or choose another name"):
        export(several, out)
    assert [path.name for path in out.iterdir()] == ["note.txt"]
    (out / "note.txt").unlink()
    export(several, out)
    load(out)


def test_it_appears_whole_or_not_at_all(tmp_path: Path, several: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = tmp_path / "there" / "out", []

    def save_file(*arguments: Any, **more: Any) -> None:
        assert not out.exists()
        written.append(arguments[1])
        if len(written) == 2:
            raise OSError("no space left")

    monkeypatch.setattr(shards, "save_file", save_file)
    with pytest.raises(OSError, match="no space left"):
        export(several, out, shard_size="200KB")
    assert list(out.parent.iterdir()) == []


# Prints [bytes of all weights, bytes at the start, and at the largest] of memory that is not a file's.
EXPORTER = """
import json, sys
from pathlib import Path
from transformers import LlamaForCausalLM
from trainer.exports import export, shards, trained
from trainer.rundir import RunDir

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

def watched(work):
    def run(*arguments, **more):
        before.append(held())
        answer = work(*arguments, **more)
        seen.append(held())
        return answer
    return run

before, seen = [], []
shards.save_file = watched(shards.save_file)
trained.Trained.merged = watched(trained.Trained.merged)
export.export(RunDir(sys.argv[1]), Path(sys.argv[2]), shard_size=sys.argv[3])
print(json.dumps([before[0], max(before + seen)]))
"""


def test_no_more_than_a_file_and_a_layer_is_held(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 16, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": 257, "tie_word_embeddings": False} | shape
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = {"path": str(tmp_path / "model"), "weights": "random"}
    _, rundir, _ = finished(tmp_path, steps=0, model=model, tokenizer="bytes", method=settings("lora"))
    # Else the allocator keeps what is given back, as it likes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", EXPORTER, str(rundir.root), str(tmp_path / "out"), "6MB"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    start, most = json.loads(done.stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    layer = 688 * 256 * 4
    assert written > 8 * 6e6
    assert most - start < 6e6 + 4 * layer
