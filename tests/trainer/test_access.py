"""What a run may not do on the machine that trains it, tried with the real command."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.alone import alone
from trainer import access, events
from trainer.access import Access, Outside
from trainer.datasetconfig import HubDataset
from trainer.documents import documents
from trainer.rundir import RunDir
from trainer.weights import Stored

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


def make(directory: Path, **changes: Any) -> RunDir:
    rundir = RunDir(directory / "run")
    rundir.root.mkdir()
    rundir.spec.write_text(alone(directory, **changes).model_dump_json())
    return rundir


def train(rundir: RunDir, limits: Access) -> tuple[int, events.Failed | None]:
    command = [sys.executable, "-m", "trainer", "run", str(rundir.root)]
    done = subprocess.run(command, env=os.environ | limits.environment(), capture_output=True)
    failed = [event for event in events.read(rundir.events) if isinstance(event, events.Failed)]
    return done.returncode, failed[0] if failed else None


def test_a_link_that_was_changed_after_submission_is_not_followed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "real.txt").write_text("a sentence " * 500)
    (data / "text.txt").symlink_to(data / "real.txt")
    changes = {"dataset": {"source": "text", "files": [str(data / "*.txt")], "sequence_length": 32}}
    limits = Access(readable=(str(data),), writable=())
    rundir = make(tmp_path, **changes)
    access.check(alone(tmp_path, **changes), limits)  # as at submission
    (data / "text.txt").unlink()
    (data / "text.txt").symlink_to("/etc/passwd")
    code, failed = train(rundir, limits)
    assert code == 64
    assert failed is not None
    assert failed.reason == "bad_configuration"
    assert failed.message.startswith("dataset.files: ")
    assert not rundir.data.exists()


def model_with_code(directory: Path, mark: Path) -> Path:
    """A model whose configuration is a Python file of its own, which leaves a mark when it is run."""
    config = LlamaConfig(**SMALL, num_attention_heads=4).to_dict()
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}}
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "odd.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddModel(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    return model


@pytest.mark.parametrize("allowed", [False, True])
def test_a_model_s_own_code_runs_only_where_the_operator_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "was-here"
    model = {"path": str(model_with_code(tmp_path, mark)), "weights": "random"}
    rundir = make(tmp_path, model=model, tokenizer="bytes", optimisation={"steps": 3})
    code, failed = train(rundir, Access(trust_remote_code=allowed))
    assert mark.exists() == allowed
    if not allowed:
        assert code == 64
        assert failed is not None
        assert "trust_remote_code" in failed.message


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_not_even_opened(tmp_path: Path) -> None:
    mark, model = tmp_path / "was-here", tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4)).save_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(mark), model / "pytorch_model.bin")
    rundir = make(tmp_path, model={"path": str(model)}, tokenizer="bytes")
    code, failed = train(rundir, Access())
    assert code == 64
    assert failed is not None
    assert "safetensors" in failed.message
    assert not mark.exists()
    # It would have gone off.
    with (tmp_path / "plain.pickle").open("wb") as file:
        pickle.dump(Bomb(mark), file)
    with (tmp_path / "plain.pickle").open("rb") as file:
        pickle.load(file)  # noqa: S301
    assert mark.exists()


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    """Else the weights of somebody's private model could be trained on, and written to a place of the trainer's."""
    private, mine = tmp_path / "private", tmp_path / "mine"
    for model in (private, mine):
        LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4)).save_pretrained(model)
    names = list(load_file(private / "model.safetensors"))
    for elsewhere in (str(private / "model.safetensors"), "../private/model.safetensors"):
        (mine / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, elsewhere)}))
        with pytest.raises(ValueError, match="not a file beside it"):
            Stored(mine)


def test_a_dataset_that_names_files_of_its_reader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a description beside it, as a repository of the hub may have one; here in a directory that may be read."""
    secret, data = tmp_path / "secret.jsonl", tmp_path / "data"
    secret.write_text('{"text": "a secret"}\n')
    data.mkdir()
    (data / "fine.jsonl").write_text('{"text": "for everybody"}\n')
    dataset = HubDataset(name=str(data))
    for name, value in Access(readable=(str(data),)).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(documents(dataset)) == ["for everybody"]
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n")
    with pytest.raises(Outside, match=r"^dataset.name: .*outside of what may be read"):
        list(documents(dataset))


@pytest.mark.parametrize("text", ["$(touch {mark})", "; touch {mark}", "`touch {mark}`", "| touch {mark}", "-c touch"])
def test_nothing_in_a_spec_reaches_a_shell(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "was-here"
    odd = text.format(mark=mark)
    rundir = make(tmp_path, model={"hub": odd}, tokenizer=odd, dataset={"source": "text", "files": [f"/{odd}"]})
    code, _ = train(rundir, Access())
    assert code in (64, 65)
    assert not mark.exists()


def test_without_limits_everything_may_be_named(tmp_path: Path) -> None:
    assert Access.of_environment() == Access()
    access.check(alone(tmp_path, checkpoints={"url": "s3://anywhere/at-all"}), Access())


def test_limits_survive_the_way_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (Access(), Access((), ()), Access(("/a", "/b c"), ("s3://x/y",), trust_remote_code=True)):
        monkeypatch.undo()
        for name, value in limits.environment().items():
            monkeypatch.setenv(name, value)
        assert Access.of_environment() == limits


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_a_trainer_that_nobody_vouches_for_any_more_ends_with_a_checkpoint(tmp_path: Path, processes: int) -> None:
    """Its supervisor is stopped, say: somebody else may want to train this."""
    changes: dict[str, Any] = {"resources": {"processes": processes}, "deepspeed": {"zero_stage": 2}}
    rundir = make(tmp_path, optimisation={"steps": 100_000}, **changes)
    rundir.vouch_until(time.monotonic() + 15)
    command = [sys.executable, "-m", "trainer", "run", str(rundir.root)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0
    found = events.read(rundir.events)
    last = found[-1]
    assert isinstance(last, events.Stopped)
    assert last.step > 0
    assert any(isinstance(event, events.Checkpointed) and event.step == last.step for event in found)
    rundir.vouch_until(time.monotonic() + 1000)
    assert rundir.is_vouched_for()
    assert len(rundir.lease.read_text()) == 25  # in place, whatever the number
