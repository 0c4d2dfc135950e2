"""Fine-tuning, trained: whatever the packing, the micro-batches and the model, it is the plain loop over examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference.product import effective_weights
from tests.trainer.finetune import made
from trainer import events
from trainer.engine import PlainEngine
from trainer.exports.export import export
from trainer.finetune.task import ExampleTask
from trainer.methods import make_method
from trainer.model import build_model
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.schedule import learning_rate
from trainer.tokenizer import load_tokenizer
from trainer.update import update
from trainer.zero import Shards

pytestmark = pytest.mark.usefixtures("process_group")

STEPS = 4


def losses(told: list[events.Event]) -> list[float]:
    return [event.loss for event in told if isinstance(event, events.Step)]


def train(run: Run, steps: int = STEPS) -> None:
    while run.step < steps:
        run.train_step(lambda: False)


def ids_and_marks(tokenizer: Any, record: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """By transformers alone."""
    found = tokenizer.apply_chat_template(
        record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"], dtype=torch.bool)


def summed(model: Any, tokenizer: Any, record: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    """(sum of the learnt tokens' losses, how many they are, how many of them are right) of one example by itself."""
    ids, marks = ids_and_marks(tokenizer, record)
    logits, wanted = model(input_ids=ids[None]).logits[0, :-1][marks[1:]], ids[1:][marks[1:]]
    right = int((logits.argmax(-1) == wanted).sum())
    return cross_entropy(logits.float(), wanted, reduction="sum"), len(wanted), right


@pytest.mark.parametrize("kind", made.SIZES)
def test_it_is_a_plain_loop_over_the_examples_one_by_one(tmp_path: Path, kind: str) -> None:
    """Written by hand on transformers' model and torch's AdamW; only the order of the examples is the product's."""
    run, told = made.run(tmp_path, kind=kind, optimisation={"micro_batch": 4, "weight_decay": 0.0})
    assert isinstance(run.task, ExampleTask)
    order = [run.task.examples_of(step) for step in range(STEPS)]
    run.evaluate()
    train(run)
    run.evaluate()

    path = made.model(tmp_path, kind)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    records = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-5, weight_decay=0.0)

    def held_out() -> tuple[float, float]:
        with torch.no_grad():
            found = [summed(model.eval(), tokenizer, record) for record in records[-5:]]
        total = sum(count for _, count, _ in found)
        return sum(float(loss) for loss, _, _ in found) / total, sum(right for *_, right in found) / total

    evaluated, expected, accuracies = [held_out()], [], []
    for step in range(STEPS):
        found = [summed(model.train(), tokenizer, records[number]) for number in order[step]]
        total = sum(count for _, count, _ in found)
        loss = torch.stack([loss for loss, _, _ in found]).sum() / total
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, run.spec.optimisation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
        accuracies.append(sum(right for *_, right in found) / total)
    evaluated.append(held_out())

    assert losses(told) == pytest.approx(expected, rel=2e-5)
    assert [e.accuracy for e in told if isinstance(e, events.Step)] == pytest.approx(accuracies, abs=0.02)
    tested = [event for event in told if isinstance(event, events.Evaluated)]
    assert [e.loss for e in tested] == pytest.approx([loss for loss, _ in evaluated], rel=2e-5)
    assert [e.accuracy for e in tested] == pytest.approx([share for _, share in evaluated], abs=0.02)
    assert [e.sequences for e in tested] == [5, 5]
    for name, parameter in model.named_parameters():
        assert (run.model.get_parameter(name) - parameter).abs().max() < 2e-4, name


METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": 4, "period": 2},
    "galore, large batch": {"name": "galore", "rank": 4, "period": 2, "switch_batches": 2, "moments": "reset"},
    "lora": {"name": "lora", "rank": 4},
    "loro": {"name": "loro", "rank": 4, "period": 2, "restart_warmup": 1},
    "gasare": {"name": "gasare", "period": 2},
}


def in_float64(directory: Path, method: dict[str, Any], ranks: int = 1, **changes: Any) -> tuple[Any, list[float]]:
    """(weights, losses) of a plain engine. `ranks`: their batches one after the other in one process, which is what
    averaging over them comes to."""
    wanted = made.spec(directory, method=method, **changes | {"resources": {"processes": ranks}})
    rundir = RunDir(directory / "run")
    made.make(wanted, rundir)
    model = build_model(wanted, load_tokenizer(wanted.tokenizer)).double()
    attached = make_method(wanted)
    attached.attach(model)
    engine = PlainEngine(wanted, model, attached)
    shards = Shards(engine)
    tasks = [ExampleTask(wanted, rundir.data, rank, torch.device("cpu")) for rank in range(ranks)]
    found = []
    for step in range(STEPS):
        batches = [batch for task in tasks for batch in task.micro_batches(step)]
        rate = learning_rate(step + 1, wanted.optimisation)
        found.append(update(engine, attached, shards, step, rate, batches).loss)
    return effective_weights(model, attached, shards), found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packing_ranks_and_micro_batches_change_nothing(tmp_path: Path, method: dict[str, Any]) -> None:
    """transformers' norms and losses are in float32 whatever the model's type."""
    weights, expected = in_float64(tmp_path, method)
    for changes in (
        {"dataset": {"packing": False}},
        {"optimisation": {"micro_batch": 1}},
        {"ranks": 2, "optimisation": {"micro_batch": 2}},
        {"ranks": 8, "dataset": {"sequence_length": 96}},
    ):
        others, found = in_float64(tmp_path, method, **changes)
        assert found == pytest.approx(expected, rel=1e-5), changes
        assert max(float((others[name] - weights[name]).abs().max()) for name in weights) < 2e-4, changes


def test_of_more_ranks_than_rows_some_only_fill_up(tmp_path: Path) -> None:
    wanted = made.spec(tmp_path, resources={"processes": 8})
    rundir = RunDir(tmp_path / "run")
    made.make(wanted, rundir)
    tasks = [ExampleTask(wanted, rundir.data, rank, torch.device("cpu")) for rank in range(8)]
    weights = [[batch.weight for batch in task.micro_batches(0)] for task in tasks]
    assert {len(of_rank) for of_rank in weights} == {1}
    assert 0.0 in [weight for (weight,) in weights]
    assert sum(weight for (weight,) in weights) == pytest.approx(8)


def test_tokens_are_those_of_the_examples_and_a_function_of_the_step(tmp_path: Path) -> None:
    run, told = made.run(tmp_path, optimisation={"global_batch": 7, "steps": 9})
    assert isinstance(run.task, ExampleTask)
    train(run, 9)
    lengths = run.task.prepared.lengths
    read = [sum(int(lengths[number]) for number in run.task.examples_of(step)) for step in range(9)]
    assert [e.tokens for e in told if isinstance(e, events.Step)] == [sum(read[: step + 1]) for step in range(9)]
    seen = [number for step in range(9) for number in run.task.examples_of(step)]
    assert sorted(seen[:19]) == sorted(seen[19:38]) == list(run.task.training) == list(range(19))
    assert seen[:19] != seen[19:38]


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_a_resumed_fine_tuning_is_bit_equal(tmp_path: Path, method: str) -> None:
    straight, told = made.run(tmp_path, "straight", method=METHODS[method])
    train(straight)
    first, before = made.run(tmp_path, "resumed", method=METHODS[method])
    train(first, 2)
    first.save()
    second, after = made.run(tmp_path, "resumed", method=METHODS[method])
    assert second.step == 2
    train(second)
    assert losses(before) + losses(after) == losses(told)
    tokens = [[e.tokens for e in found if isinstance(e, events.Step)] for found in (told, after)]
    assert tokens[1] == tokens[0][2:]


@pytest.mark.parametrize("method", ["full", "galore", "lora"])
def test_an_export_loads_in_transformers_to_the_same_loss_with_the_template_that_was_used(
    tmp_path: Path, method: str
) -> None:
    template = made.MARKED.replace("<|im_start|>", "<|im_start|>the ")
    run, told = made.run(tmp_path, method=METHODS[method], dataset={"chat_template": template, "sequence_length": 128})
    train(run)
    run.save(run.evaluate())
    assert export(RunDir(tmp_path / "run"), tmp_path / "out") == STEPS
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert tokenizer.chat_template == template
    # Whoever serves it stops where an answer was taught to end.
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in np.atleast_1d(model.generation_config.eos_token_id)
    records = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = [summed(model.eval(), tokenizer, record) for record in records[-5:]]
    (loss,) = [event.loss for event in told if isinstance(event, events.Evaluated)]
    assert sum(float(part) for part, _, _ in found) / sum(count for _, count, _ in found) == pytest.approx(
        loss, rel=1e-5
    )


def test_what_is_held_out_can_be_asked(tmp_path: Path) -> None:
    run, _ = made.run(tmp_path)
    assert isinstance(run.task, ExampleTask)
    tokenizer = made.tokenizer()
    record = json.loads((tmp_path / "sums.jsonl").read_text().splitlines()[-5])
    asked = next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
    ((prompt, answer),) = run.task.held_out_answers(1)
    expected = tokenizer.apply_chat_template(record["messages"][:asked], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == expected
    assert tokenizer.decode(answer) == record["messages"][asked]["content"] + "<|im_end|>"
