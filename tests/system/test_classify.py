"""The life of a classifier, driven by OpenAI's client as it is, against the whole service."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.fine_tuning import FineTuningJob
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.api.protocol import typed
from tests.system.service import running
from tests.system.test_openai import until
from tests.trainer.classify import made

OURS = {
    "optimizer": {"name": "lora", "rank": 8},
    "optimisation": {"learning_rate": 1e-2, "others": "trained"},
    "dataset": {"sequence_length": 24, "metric": "matthews"},
}


def classify(epochs: int) -> Any:
    """A method that OpenAI does not have: the client's types do not know it, the client passes it on."""
    return {"type": "classify", "classify": {"hyperparameters": {"n_epochs": epochs, "batch_size": 16}}}


def labelled(count: int, seed: int) -> list[tuple[str, str]]:
    return [(one["text"], one["label"]) for one in made.sentences(count, seed)]


def lines(examples: list[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"sentence": text, "mood": mood}) + "\n" for text, mood in examples).encode()


def uploaded(client: openai.OpenAI, name: str, examples: list[tuple[str, str]]) -> str:
    columns = {"columns": {"text": "sentence", "label": "mood"}}
    return client.files.create(file=(name, lines(examples)), purpose="fine-tune", extra_body=columns).id


def evaluations(client: openai.OpenAI, job: FineTuningJob) -> list[Any]:
    """What the job's events say of held-out examples, oldest first."""
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.data for event in events if "valid_loss" in event.data][::-1]


def guesses(directory: Path, texts: list[str]) -> list[str]:
    """By transformers alone, with what the directory holds."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokens = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        found = model(**tokens(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
    return [model.config.id2label[int(place)] for place in found]


def test_from_labelled_sentences_to_a_classifier_that_transformers_loads(tmp_path: Path) -> None:
    encoder, held_out = made.base(tmp_path), labelled(90, seed=1)
    alias = json.dumps({"encoder": {"path": str(encoder)}})
    with (
        running(tmp_path / "home", STIEFEL_MODELS=alias) as service,
        openai.OpenAI(base_url=f"{service.stack.api_url}/v1", api_key="none") as client,
    ):
        jobs = client.fine_tuning.jobs
        training = uploaded(client, "train.jsonl", labelled(320, seed=0))
        validation = uploaded(client, "held-out.jsonl", held_out)
        files: dict[str, Any] = {"training_file": training, "validation_file": validation, "seed": 3}
        job = jobs.create(model="encoder", suffix="mood", method=classify(4), extra_body=OURS, **files)
        assert job.method and job.method.type == "classify"
        done = until(lambda: jobs.retrieve(job.id), lambda now: now.status == "succeeded")
        assert done.fine_tuned_model.startswith("ft:encoder:mood:")

        # One figure, wherever it is told.
        before, *_, after = evaluations(client, done)
        moods = [mood for _, mood in held_out]
        majority = max(moods.count(mood) for mood in set(moods)) / len(moods)
        assert before["valid_loss"] > 2 * after["valid_loss"]
        assert after["valid_mean_token_accuracy"] > majority + 0.1
        assert after["metrics"]["matthews"] > 0.7 and after["metrics"]["accuracy"] == after["accuracy"]
        newest = next(iter(jobs.checkpoints.list(job.id)))
        typed(newest)
        assert newest.step_number == after["step"] == 80
        assert newest.metrics.full_valid_mean_token_accuracy == after["accuracy"]
        table = client.files.content(done.result_files[0]).text.splitlines()
        last = dict(zip(table[0].split(","), table[-1].split(","), strict=True))
        assert (float(last["valid_loss"]), float(last["valid_mean_token_accuracy"])) == (
            after["valid_loss"],
            after["accuracy"],
        )

        # Trained on by its name, it begins with the head that it has, from the export that the worker made of it.
        further = jobs.create(model=done.fine_tuned_model, method=classify(1), extra_body=OURS, **files)
        further = until(lambda: jobs.retrieve(further.id), lambda now: now.status == "succeeded")
        first = evaluations(client, further)[0]
        assert first["valid_loss"] == pytest.approx(after["valid_loss"], rel=1e-5)
        export = service.rundir(done.id.removeprefix("ft")).export(80)
        found = guesses(export, [text for text, _ in held_out])
        assert accuracy_score(moods, found) == pytest.approx(after["accuracy"])
        assert matthews_corrcoef(moods, found) == pytest.approx(after["metrics"]["matthews"])
        assert first["metrics"] == pytest.approx(after["metrics"])

        # It tells moods apart, and does not speak.
        with pytest.raises(openai.BadRequestError, match="is a classifier") as refused:
            jobs.create(model=done.fine_tuned_model, extra_body={"optimizer": "lora"}, training_file=training)
        assert refused.value.param == "model"
