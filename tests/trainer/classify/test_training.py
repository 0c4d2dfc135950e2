"""Classification by every method, on several architectures: against transformers and scikit-learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from tests.trainer.classify.made import SIZES, base, finished, make_run, sentences, spec, tokenizer, write
from trainer import events
from trainer.classify.task import LabelTask
from trainer.errors import SpecError
from trainer.exports.export import export
from trainer.exports.loading import load_factored
from trainer.heads import head_parameters
from trainer.methodconfig import METHOD_CONFIGS
from trainer.run import Run
from trainer.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("process_group")

# What makes a run of four steps with each method see what it is about.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "galore": {"rank": 4, "period": 2},
    "golore": {"rank": 4, "period": 2, "random_fraction": 0.5},
    "galore_plus": {"rank": 4, "period": 2, "residual_warmup": 2},
    "gasare": {"period": 2},
    "gosare": {"period": 2},
    "flora": {"rank": 4, "period": 2},
    "garare": {"rank": 4, "period": 2},
    "loro": {"rank": 4, "period": 2, "restart_warmup": 1},
    "lowrank": {"rank": 8},
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "relora": {"rank": 4, "period": 2, "restart_warmup": 1},
    "sltrain": {"rank": 4},
}


def task_of(run: Run) -> LabelTask:
    assert isinstance(run.task, LabelTask)
    return run.task


def held_out(directory: Path, run: Run) -> list[dict[str, Any]]:
    lines = (directory / "sentences.jsonl").read_text().splitlines()
    return [json.loads(lines[number]) for number in task_of(run).held_out]


def predictions(model: Any, tokens: Any, records: list[dict[str, Any]], limit: int = 24) -> torch.Tensor:
    """Logits as a user of the export computes them, all in one padded batch."""
    batch = tokens(
        [record["text"] for record in records],
        [record["pair"] for record in records] if "pair" in records[0] else None,
        truncation=True, max_length=limit, padding=True, return_tensors="pt",
    )  # fmt: skip
    if getattr(model.config, "type_vocab_size", 0) < 2:
        batch.pop("token_type_ids", None)
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_by_every_method_the_export_predicts_what_was_measured(tmp_path: Path, name: str) -> None:
    random = name in ("lowrank", "sltrain")
    model = {"path": str(base(tmp_path)), "weights": "random" if random else "pretrained"}
    run, rundir, (before, after) = finished(tmp_path, method={"name": name} | SETTINGS[name], model=model)
    assert after.sequences == 15
    export(rundir, tmp_path / "out")
    loaded, tokens = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert loaded.config.id2label == {0: "neg", 1: "pos"}
    assert loaded.config.problem_type == "single_label_classification"
    records = held_out(tmp_path, run)
    logits = predictions(loaded, tokens, records)
    wanted = torch.tensor([["neg", "pos"].index(record["label"]) for record in records])
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    assert float(loss) == pytest.approx(after.loss, abs=1e-5)
    guesses = logits.argmax(-1)
    assert after.accuracy == pytest.approx(accuracy_score(wanted, guesses))
    assert after.metrics["matthews"] == pytest.approx(matthews_corrcoef(wanted, guesses))
    assert after.metrics["f1"] == pytest.approx(f1_score(wanted, guesses))
    assert after.loss != before.loss
    if not random and name != "full":
        # Embeddings and norms stay, the head is trained.
        original = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base-roberta").state_dict()
        changed = {key for key, value in loaded.state_dict().items() if not torch.equal(value, original[key])}
        replaced = {f"{layer.name}.weight" for layer in run.method.layers}
        assert changed == replaced | set(head_parameters(loaded))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", SIZES)
def test_on_every_architecture_a_pair_is_classified_and_exported(tmp_path: Path, kind: str, stage: int) -> None:
    write(tmp_path / "sentences.jsonl", sentences(60, pairs=True))
    run, rundir, (_, after) = finished(
        tmp_path, kind, method={"name": "galore", "rank": 4, "period": 3}, deepspeed={"zero_stage": stage}
    )
    export(rundir, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    records = held_out(tmp_path, run)
    logits = predictions(loaded, tokens, records)
    wanted = torch.tensor([["neg", "pos"].index(record["label"]) for record in records])
    assert float(torch.nn.functional.cross_entropy(logits, wanted)) == pytest.approx(after.loss, abs=1e-5)
    assert after.accuracy == pytest.approx(accuracy_score(wanted, logits.argmax(-1)))


@pytest.mark.parametrize("micro", [8, 4, 1])
def test_full_training_is_that_of_a_plain_loop(tmp_path: Path, micro: int) -> None:
    run, found = make_run(tmp_path, optimisation={"micro_batch": micro, "epsilon": 1e-4})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base(tmp_path), num_labels=2)
    state = dict(model.state_dict())
    # The new head is ours: drawn from the seed, whatever transformers draws.
    state |= {key: p.detach().clone() for key, p in head_parameters(run.model).items()}
    model.load_state_dict(state)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1e-4, weight_decay=0.0)
    collate = DataCollatorWithPadding(tokenizer())
    lines = [json.loads(line) for line in (tmp_path / "sentences.jsonl").read_text().splitlines()]
    for step in range(4):
        task = task_of(run)
        numbers = [task._order[step * 8 + place] for place in range(8)]
        encoded = [tokenizer()(lines[n]["text"], return_token_type_ids=False) for n in numbers]
        batch = collate(encoded)
        labels = torch.tensor([["neg", "pos"].index(lines[n]["label"]) for n in numbers])
        loss = model(**batch, labels=labels).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, run.spec.optimisation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.train_step(lambda: False)
        (*_, last) = [event for event in found if isinstance(event, events.Step)]
        assert last.loss == pytest.approx(float(loss.detach()), abs=2e-6)
    theirs = model.state_dict()
    for key, parameter in run.model.named_parameters():
        assert torch.allclose(run.shards.read(parameter), theirs[key], atol=1e-5), key


@pytest.mark.parametrize("name", ["lora", "galore"])
def test_what_can_be_learnt_is_learnt_well_above_the_majority(tmp_path: Path, name: str) -> None:
    write(tmp_path / "sentences.jsonl", sentences(260))
    run, _, (before, after) = finished(
        tmp_path,
        method={"name": name, "rank": 8} | ({"alpha": 2.0, "period": 40} if name == "galore" else {"alpha": 16.0}),
        optimisation={"steps": 120, "global_batch": 16, "learning_rate": 5e-3, "warmup_steps": 5},
    )
    labels = [record["label"] for record in held_out(tmp_path, run)]
    majority = max(labels.count("pos"), labels.count("neg")) / len(labels)
    assert after.accuracy is not None and after.accuracy > majority + 0.15
    assert after.accuracy > 0.95
    assert after.metrics["matthews"] > 0.9
    assert after.loss < before.loss - 0.3


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["galore", "loro", "lora"])
def test_resumed_it_goes_on_to_the_bit_with_dropout(tmp_path: Path, name: str, stage: int) -> None:
    base(tmp_path, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    changes: dict[str, Any] = {
        "method": {"name": name} | SETTINGS[name],
        "deepspeed": {"zero_stage": stage},
        "dataset": {"labels": None},  # found in the files, and remembered
    }
    run, found = make_run(tmp_path, **changes)
    for _ in range(2):
        run.train_step(lambda: False)
    run.save()
    again, others = make_run(tmp_path, **changes)
    assert again.step == 2
    for one in (run, again):
        one.train_step(lambda: False)
        one.train_step(lambda: False)
        one.evaluate()
    losses = [[e.loss for e in those if isinstance(e, events.Step) and e.step > 2] for those in (found, others)]
    assert losses[0] == losses[1]
    evaluated = [[e for e in those if isinstance(e, events.Evaluated)][-1] for those in (found, others)]
    assert evaluated[0].loss == evaluated[1].loss
    assert evaluated[0].metrics == evaluated[1].metrics


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_a_regression_is_judged_by_correlations(tmp_path: Path, kind: str) -> None:
    run, rundir, (before, after) = finished(
        tmp_path,
        kind,
        dataset={"kind": "number", "labels": None, "columns": {"label": "score"}},
        optimisation={"steps": 150, "learning_rate": 5e-3, "global_batch": 8},
    )
    assert after.accuracy is None
    assert list(after.metrics) == ["pearson", "spearman"]
    assert after.metrics["pearson"] > 0.6
    export(rundir, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 1 and loaded.config.problem_type == "regression"
    records = held_out(tmp_path, run)
    numbers = predictions(loaded, AutoTokenizer.from_pretrained(tmp_path / "out"), records)[:, 0]
    wanted = torch.tensor([record["score"] for record in records])
    assert float(((numbers - wanted) ** 2).mean()) == pytest.approx(after.loss, abs=1e-4)
    assert np.corrcoef(numbers, wanted)[0, 1] == pytest.approx(after.metrics["pearson"], abs=1e-4)


def test_labels_of_a_regression_may_be_large(tmp_path: Path) -> None:
    """A squared error is no log-likelihood: it has no size beyond which a run has diverged."""
    write(tmp_path / "sentences.jsonl", [record | {"score": 100 * record["score"]} for record in sentences(60)])
    dataset = {"kind": "number", "labels": None, "columns": {"label": "score"}}
    run, found = make_run(tmp_path, dataset=dataset)
    run.evaluate()
    run.train_step(lambda: False)
    (before,) = [event for event in found if isinstance(event, events.Evaluated)]
    assert before.loss > 10_000 and np.isfinite(before.perplexity)


@pytest.mark.parametrize("others", ["frozen", "trained"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "deberta", "llama"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_for_peft_brings_its_head(tmp_path: Path, name: str, kind: str, others: str) -> None:
    from peft import PeftModel

    run, rundir, _ = finished(tmp_path, kind, method={"name": name, "rank": 4}, optimisation={"others": others})
    export(rundir, tmp_path / "out", form="peft")
    pretrained = AutoModelForSequenceClassification.from_pretrained(
        base(tmp_path, kind), num_labels=2, pad_token_id=run.model.config.pad_token_id
    )
    adapted = PeftModel.from_pretrained(pretrained, tmp_path / "out")
    records = held_out(tmp_path, run)
    ours = predictions(run.model, AutoTokenizer.from_pretrained(tmp_path / "out"), records)
    theirs = predictions(adapted, AutoTokenizer.from_pretrained(tmp_path / "out"), records)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lora", "lowrank"])
def test_from_random_weights_other_formats_load_too(tmp_path: Path, name: str) -> None:
    model = {"path": str(base(tmp_path)), "weights": "random"}
    run, rundir, _ = finished(tmp_path, method={"name": name, "rank": 4}, model=model)
    tokens, records = tokenizer(), held_out(tmp_path, run)
    ours = predictions(run.model, tokens, records)
    if name == "lowrank":
        export(rundir, tmp_path / "out", form="factored")
        theirs = load_factored(tmp_path / "out")
    else:
        from peft import AutoPeftModelForSequenceClassification

        export(rundir, tmp_path / "out", form="peft")
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (ours - predictions(theirs, tokens, records)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_a_classifier_keeps_its_head_for_the_same_labels_alone(tmp_path: Path, kind: str) -> None:
    first, rundir, (_, after) = finished(tmp_path, kind)
    export(rundir, tmp_path / "first")
    further = {"model": {"path": str(tmp_path / "first")}, "tokenizer": str(tmp_path / "first")}
    more = tmp_path / "more"
    write(more / "sentences.jsonl", sentences(60))
    same, found = make_run(more, kind, **further)
    same.evaluate()
    (evaluated,) = [event for event in found if isinstance(event, events.Evaluated)]
    assert evaluated.loss == pytest.approx(after.loss, abs=1e-6)

    others = tmp_path / "others"
    write(others / "sentences.jsonl", [{**r, "label": {"pos": "up", "neg": "down"}[r["label"]]} for r in sentences(60)])
    other, _ = make_run(others, kind, **further, dataset={"labels": ["down", "up"]})
    three = tmp_path / "three"
    write(three / "sentences.jsonl", sentences(60))
    wider, _ = make_run(three, kind, **further, dataset={"labels": ["neg", "pos", "unknown"]})
    assert wider.model.config.num_labels == 3
    for run in (other, wider):
        head = head_parameters(run.model)
        for key, parameter in run.model.named_parameters():
            old = dict(first.model.named_parameters())[key]
            is_same = old.shape == parameter.shape and torch.equal(old, parameter)
            assert is_same == (key not in head) or "bias" in key


def test_a_new_head_is_the_seed_s_whoever_loads_the_base(tmp_path: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        where = tmp_path / str(len(heads))
        run, _ = make_run(where, optimisation={"seed": seed})
        heads.append(head_parameters(run.model)["classifier.out_proj.weight"].detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = base(tmp_path)
    with pytest.raises(SpecError, match="sequence_length: 65 is above the 64 tokens"):
        make_run(tmp_path / "long", dataset={"sequence_length": 65})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SpecError, match=r"weights lack roberta\.encoder\.layer\.2\..* beside its head"):
        make_run(tmp_path)


@pytest.mark.parametrize("stated", [-1, 5])
def test_a_decoder_is_told_what_the_tokeniser_pads_with(tmp_path: Path, stated: int) -> None:
    path = base(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pad_token_id": stated}))
    run, _ = make_run(tmp_path, "llama")
    run.train_step(lambda: False)
    padding = run.tokenizer.pad_token_id
    assert run.model.config.pad_token_id == padding != stated
    assert padding in task_of(run).micro_batches(1)[0].tokens


def test_an_evaluation_may_be_limited(tmp_path: Path) -> None:
    assert spec(tmp_path).optimisation.evaluation_sequences > 10**9
    run, found = make_run(tmp_path, optimisation={"evaluation_sequences": 5})
    run.evaluate()
    assert [event.sequences for event in found if isinstance(event, events.Evaluated)] == [5]
