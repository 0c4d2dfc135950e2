"""The whole life of a fine-tuning, driven by OpenAI's client as it is, against the whole service."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from tests.api.protocol import typed
from tests.system.service import SECONDS, running

ALIAS = json.dumps({"tiny": {"preset": "llama-tiny"}})
# What OpenAI does not know, the client passes on.
OURS = {
    "optimizer": {"name": "galore", "rank": 8, "period": 20},
    "dataset": {"sequence_length": 128},
    "checkpoints": {"every": 40, "keep": 2},
}


def until(job: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not holds(found := job()):
        assert found.status not in ("failed", "cancelled"), found.error
        assert time.monotonic() < deadline, f"still {found.status}"
        time.sleep(0.1)
    return found


def test_from_an_upload_to_a_model_that_is_tuned_further(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(8)
        for b in range(8)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with (
        running(tmp_path, STIEFEL_MODELS=ALIAS) as service,
        openai.OpenAI(base_url=f"{service.stack.api_url}/v1", api_key="none") as client,
    ):
        jobs = client.fine_tuning.jobs
        file = client.files.create(file=("sums.jsonl", data), purpose="fine-tune")
        # At once: the service waits for the check by itself.
        job = jobs.create(
            model="tiny",
            training_file=file.id,
            validation_file=file.id,
            suffix="sums",
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30}}},
            extra_body=OURS,
        )
        typed(job)
        assert job.hyperparameters.batch_size == 8
        until(lambda: jobs.retrieve(job.id), lambda now: now.to_dict()["progress"]["step"] >= 45)
        jobs.pause(job.id)
        paused = until(lambda: jobs.retrieve(job.id), lambda now: now.status == "paused")
        assert 45 <= paused.to_dict()["progress"]["step"] < 240
        assert not jobs.list(limit=1).data[0].fine_tuned_model
        jobs.resume(job.id)
        done = until(lambda: jobs.retrieve(job.id), lambda now: now.status == "succeeded")
        typed(done)
        assert done.trained_tokens and done.finished_at and not done.estimated_finish
        (result,) = done.result_files
        table = client.files.content(result).text.splitlines()
        assert table[0].startswith("step,train_loss,")
        assert [int(line.partition(",")[0]) for line in table[1:]] == list(range(241))
        happened = list(jobs.list_events(job.id, limit=70))
        for event in happened:
            typed(event)
        assert len({event.id for event in happened}) == len(happened)
        types = [event.message for event in happened]
        assert types[-1] == "The job is queued" and types[0].startswith("The job has succeeded")
        losses = [event.data["valid_loss"] for event in happened if "valid_loss" in event.data]
        assert losses[0] < losses[-1]
        steps = [event.data["step"] for event in happened if "train_loss" in event.data]
        assert steps == list(range(240, 0, -1))
        checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
        for checkpoint in checkpoints:
            typed(checkpoint)
        assert [one.step_number for one in checkpoints][0] == 240 and len(checkpoints) in (2, 3)

        # By its name it can be looked up, and trained on: from where it stands, not from the beginning.
        name = done.fine_tuned_model
        assert name in [model.id for model in client.models.list()]
        typed(client.models.retrieve(name))
        further = jobs.create(model=name, training_file=file.id, hyperparameters={"n_epochs": 2}, extra_body=OURS)
        assert further.fine_tuned_model is None and further.model == name
        further = until(lambda: jobs.retrieve(further.id), lambda now: now.status == "succeeded")
        assert further.fine_tuned_model.startswith("ft:tiny::")
        first, again = (service.curve(one.id.removeprefix("ft")) for one in (done, further))
        assert again[0][1] < (first[0][1] + first[-1][1]) / 2
        assert client.models.delete(name).deleted
        try:
            jobs.create(model=name, training_file=file.id, extra_body=OURS)
        except openai.BadRequestError as error:
            assert error.param == "model" and error.response.headers["x-should-retry"] == "false"
        else:
            raise AssertionError("a deleted model was taken")
