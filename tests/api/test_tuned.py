"""How a fine-tuning goes on and ends, as OpenAI's client tells it."""

import openai
import pytest

from jobs import lease, reports
from tests.api.protocol import typed
from tests.api.room import Room
from trainer import events


def test_a_life_as_openai_tells_it(room: Room) -> None:
    job = room.create(suffix="my suffix!", validation_file=room.upload())
    paused = room.jobs.pause(job.id)
    typed(paused)
    assert paused.status == "paused"
    assert room.jobs.resume(job.id).status == "queued"
    run(room, job.id.removeprefix("ft"))
    done = room.jobs.retrieve(job.id)
    typed(done)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 400, None)
    counted = room.client.files.retrieve(done.training_file).to_dict()["statistics"]["tokens"]
    assert (counted["tokenizer"], counted["tokens"], counted["trained_tokens"], counted["longest"]) == (
        "bytes",
        100,
        90,
        9,
    )
    assert "tokens" not in room.client.files.retrieve(done.validation_file).to_dict()["statistics"]
    assert done.fine_tuned_model == f"ft:llama-tiny:my-suffix:{job.id.removeprefix('ftjob-')}"
    assert isinstance(done.finished_at, int) and done.finished_at >= done.created_at
    happened = list(room.jobs.list_events(job.id, limit=3))
    for event in happened:
        typed(event)
    assert len({event.id for event in happened}) == len(happened) > 6
    assert [event.created_at for event in happened] == sorted((e.created_at for e in happened), reverse=True)
    assert happened[0].message.startswith("The job has succeeded")
    (evaluated,) = [event for event in happened if "valid_loss" in event.data]
    assert (evaluated.type, evaluated.data["valid_loss"]) == ("metrics", 2.5)
    steps = [event.data for event in happened if "train_loss" in event.data]
    assert [(data["step"], data["total_steps"], data["train_loss"]) for data in steps] == [
        (step, done.progress["steps"], 1.5) for step in (4, 3, 2, 1)
    ]
    for unknown in ("ftevent-999999999", "event"):
        with pytest.raises(openai.BadRequestError):
            room.jobs.list_events(job.id, after=unknown)
    checkpoints = list(room.jobs.checkpoints.list(job.id, limit=1))
    for checkpoint in checkpoints:
        typed(checkpoint)
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 2]
    # One that has made room for a newer one since.
    gone = checkpoints[0].id.removesuffix("-4") + "-3"
    assert [one.step_number for one in room.jobs.checkpoints.list(job.id, after=gone)] == [2]
    assert checkpoints[1].metrics.to_dict() == {
        "step": 2,
        "train_loss": 1.5,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 2.5,
        "valid_mean_token_accuracy": 0.25,
        "full_valid_loss": 2.5,
        "full_valid_mean_token_accuracy": 0.25,
    }
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
    with pytest.raises(openai.ConflictError):
        room.jobs.cancel(job.id)


def test_a_failed_job_says_why(room: Room) -> None:
    job = room.create()
    taken = lease.claim(room.database, room.settings, job.id.removeprefix("ft"), "w:0")
    assert taken is not None
    error = {"code": "bad_data", "message": "dataset.files: no example is left"}
    lease.finish(room.database, room.settings, taken, lease.Outcome("failed", 65, error))
    failed = room.jobs.retrieve(job.id)
    typed(failed)
    assert failed.status == "failed" and failed.fine_tuned_model is None
    assert failed.error.to_dict() == error | {"param": "training_file"}
    assert room.jobs.list_events(job.id).data[0].level == "error"


def run(room: Room, job_id: str) -> None:
    """What a worker would report of four steps."""
    taken = lease.claim(room.database, room.settings, job_id, "w:0")
    assert taken is not None
    told: list[events.Event] = [
        events.Prepared(
            step=0, examples=4, held_out=4, left_out=0, truncated=0, tokens=100, trained_tokens=90, longest=9, median=8
        ),
        *(
            events.Step(
                step=step,
                loss=1.5,
                learning_rate=0.1,
                gradient_norm=1.0,
                tokens=100 * step,
                seconds=0.1,
                projection_seconds=0.0,
                tokens_per_second=1000.0,
                peak_device_bytes=None,
                peak_host_bytes=1,
                accuracy=0.5,
            )
            for step in range(1, 5)
        ),
        events.Evaluated(step=2, loss=2.5, perplexity=12.0, sequences=4, seconds=0.1, accuracy=0.25),
        events.Checkpointed(step=2, path="/nowhere", bytes=1, seconds=0.1, loss=2.5),
        events.Checkpointed(step=4, path="/nowhere", bytes=1, seconds=0.1),
        events.Finished(step=4, seconds=1.0),
    ]
    reports.record(room.database, taken, list(enumerate(told, 1)), len(told))
    lease.finish(room.database, room.settings, taken, lease.Outcome("succeeded", 0))
