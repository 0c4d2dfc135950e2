"""The whole way with real processes: POST → Redis → Celery → torchrun, two ranks → database → GET, Prometheus."""

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.system.service import running
from trainer.checkpoint.place import Directory
from trainer.rundir import RunDir


def test_a_posted_job_is_trained_by_two_ranks_and_can_be_watched_to_its_end(
    tmp_path: Path, postgresql: Callable[[], str]
) -> None:
    """With PostgreSQL; all other tests of the whole service have SQLite."""
    with running(tmp_path, STIEFEL_DATABASE_URL=postgresql()) as service:
        job_id = service.submit(
            resources={"processes": 2},
            deepspeed={"zero_stage": 3},
            optimisation={"steps": 30},
            checkpoints={"every": 15},
        )
        job = service.wait(job_id, "succeeded")
        assert job["progress"]["ratio"] == 1.0
        assert [attempt["outcome"] for attempt in job["attempts"]] == ["succeeded"]
        assert service.http.get("/readyz").json() == {"status": "ok", "database": "ok", "broker": "ok"}

        curve = service.curve(job_id)
        assert [step for step, _ in curve] == list(range(1, 31))
        assert curve[-1][1] < curve[0][1] - 1.0
        metrics = service.http.get(f"/v1/jobs/{job_id}/metrics?thin_to=10").json()
        assert [p["step"] for p in metrics["points"]] == list(range(3, 31, 3))
        assert [e["step"] for e in metrics["evaluations"]] == [0, *range(3, 31, 3)]
        assert metrics["evaluations"][-1]["perplexity"] < metrics["evaluations"][0]["perplexity"] / 2

        kinds = [e["type"] for e in service.http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]]
        assert kinds[:3] == ["queued", "claimed", "preparing"]
        assert kinds.count("switched") == 6
        assert kinds[-2:] == ["finished", "succeeded"]

        checkpoints = service.http.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
        assert [(c["step"], c["kept"]) for c in checkpoints] == [(30, True), (15, True)]
        assert all((Path(c["path"]) / "COMPLETE").exists() for c in checkpoints)
        assert "step 30: finished after" in service.http.get(f"/v1/jobs/{job_id}/logs?tail=100000").json()["text"]

        text = service.http.get("/metrics").text
        samples = {
            s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if s.labels.get("job_id")
        }
        assert samples["stiefel_job_step"] == 30
        assert samples["stiefel_job_train_loss"] == curve[-1][1]
        assert samples["stiefel_job_tokens_total"] == 30 * 4 * 64
        assert samples["stiefel_job_optimizer_state_bytes"] > 0
        home = service.stack.home
        assert service.trainers(job_id) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.stack.api_url}/healthz")
    assert Directory(RunDir(home / "runs" / job_id).checkpoints).complete_steps()
    shutil.rmtree(home / "runs")


def test_a_bad_job_never_starts_and_a_job_that_fails_says_why(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        # Nothing can know before training that this text is not what its ending says.
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' * 200 + "{not json\n")
        job_id = service.submit(
            dataset={"source": "jsonl", "files": [str(tmp_path / "bad.jsonl")], "sequence_length": 16}
        )
        job = service.wait_until(job_id, lambda seen: seen["error"] is not None and seen["state"] == "failed")
        assert job["error"]["code"] == "bad_data"
        assert "bad.jsonl, line 201" in job["error"]["message"]
        assert len(job["attempts"]) == 1  # the same data would fail the same way


def test_the_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    import subprocess
    import sys

    with running(tmp_path) as service:
        job_id = service.submit(optimisation={"steps": 12, "weight_decay": 0.1})
        job = service.wait(job_id, "succeeded")
        evaluated = service.http.get(f"/v1/jobs/{job_id}/metrics").json()["evaluations"][-1]
    out = tmp_path / "merged"
    subprocess.run([sys.executable, "-m", "trainer", "export", job["run_directory"], str(out)], check=True)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("naïve π").input_ids) == "naïve π"
    assert loss_of(model, Path(job["run_directory"]), evaluated["sequences"]) == pytest.approx(
        evaluated["loss"], abs=1e-5
    )


def loss_of(model: object, run: Path, sequences: int) -> float:
    """The loss on the first held-out sequences, read from the run's token file without any of the trainer's code."""
    import json

    import numpy as np
    import torch

    meta = json.loads((run / "data" / "meta.json").read_text())
    tokens = np.fromfile(run / "data" / "tokens.bin", dtype=meta["dtype"])
    whole = len(tokens) // 64
    held_out = max(1, round(whole * 0.01))
    rows = tokens[: whole * 64].reshape(whole, 64)[whole - held_out :][:sequences]
    batch = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)  # type: ignore[operator]
