"""What a model says while it is trained: what its export says, and nothing of it changes the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.group import run_group
from tests.trainer.finetune import made
from trainer import events
from trainer.exports.export import export
from trainer.run import Run
from trainer.rundir import RunDir

GALORE = {"name": "galore", "rank": 4, "period": 2}


def evaluated(run: Run) -> None:
    """Before, in the middle, and at the end."""
    run.evaluate()
    while run.step < 4:
        run.train_step(lambda: False)
        if run.step % 2 == 0:
            run.evaluate()


def of(told: list[events.Event], *kinds: type) -> list[dict[str, Any]]:
    """Without what is measured in seconds and bytes."""
    timed = {"at", "seconds", "projection_seconds", "tokens_per_second", "peak_host_bytes", "mfu"}
    return [event.model_dump(exclude=timed) for event in told if isinstance(event, kinds)]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_are_bit_equal_with_and_without_samples(tmp_path: Path, stage: int) -> None:
    curves = {}
    for count in (0, 3):
        changes: Any = {"dataset": {"samples": count, "sample_tokens": 6}, "deepspeed": {"zero_stage": stage}}
        run, told = made.run(tmp_path, name=f"run-{count}", method=GALORE, **changes)
        evaluated(run)
        curves[count] = of(told, events.Step, events.Evaluated)
        assert len(of(told, events.Sampled)) == 3 * count
    assert curves[0] == curves[3]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sample_is_what_the_export_says_to_the_same_prompt(tmp_path: Path, kind: str) -> None:
    # Slowly: what has learnt no more than that answers end says nothing.
    slow = {"learning_rate": 1e-4}
    run, told = made.run(tmp_path, kind=kind, dataset={"samples": 4, "sample_tokens": 12}, optimisation=slow)
    evaluated(run)
    run.save()
    export(RunDir(tmp_path / "run"), tmp_path / "out")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    records = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    said = of(told, events.Sampled)[-4:]
    assert len({found["text"] for found in said}) > 1, "texts that say nothing compare nothing"
    # A fifth of 24 is held out: the last ones.
    for found, record in zip(said, records[-5:], strict=False):
        until = next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(
            record["messages"][:until], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert found["prompt"] == tokenizer.decode(prompt["input_ids"][0])
        assert found["wanted"] == record["messages"][until]["content"] + "<|im_end|>"
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        behind = out[0, prompt["input_ids"].shape[1] :]
        assert found["text"] == tokenizer.decode(behind).removesuffix("<|im_end|>")


@pytest.mark.usefixtures("process_group")
def test_a_sample_ends_with_its_turn_whatever_ends_a_text(tmp_path: Path) -> None:
    path = made.model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    turn, tokenizer.eos_token = tokenizer.eos_token_id, "<|im_start|>"
    tokenizer.save_pretrained(path)
    run, told = made.run(tmp_path, dataset={"samples": 1, "sample_tokens": 5})
    head = run.model.get_output_embeddings()
    # Of all tokens it says this one alone.
    head.register_forward_hook(lambda *given: torch.zeros_like(given[-1]).index_fill(-1, torch.tensor([turn]), 1.0))
    run.evaluate()
    assert [said["text"] for said in of(told, events.Sampled)] == [""]


@pytest.mark.usefixtures("process_group")
def test_of_a_text_the_second_half_is_asked_for(tmp_path: Path) -> None:
    made.write(tmp_path / "sums.jsonl", [{"text": f"{n} and {n} make {n + n}."} for n in range(24)])
    run, told = made.run(tmp_path, dataset={"samples": 1})
    run.evaluate()
    (said,) = of(told, events.Sampled)
    assert said["prompt"] + said["wanted"] == "19 and 19 make 38.<|im_end|>"
    assert 3 < len(said["prompt"]) < 15


def test_two_ranks_at_stage_3_train_as_without_samples(tmp_path: Path) -> None:
    cases = []
    for name, count in (("with", 3), ("without", 0)):
        changes: Any = {"dataset": {"samples": count, "sample_tokens": 6}, "deepspeed": {"zero_stage": 3}}
        wanted = made.spec(tmp_path, method=GALORE, resources={"processes": 2}, **changes)
        spec = wanted.model_dump(mode="json")
        cases.append({"directory": str(tmp_path / name), "spec": spec, "steps": 4, "evaluate_every": 2})
    run_group(tmp_path, 2, cases)
    told = {}
    for case in cases:
        answer = json.loads((Path(case["directory"]) / "answer.json").read_text())
        told[case["directory"]] = [events.parse(json.dumps(event)) for event in answer["events"]]
    with_samples, without = told.values()
    assert of(with_samples, events.Step, events.Evaluated) == of(without, events.Step, events.Evaluated)
    assert len(of(with_samples, events.Sampled)) == 6
    assert len(of(with_samples, events.Evaluated)) == 2
