"""What is trained under faults, and what becomes of each when nobody disturbs it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trainer
from tests.conftest import job_body
from tests.system.service import running


def _body(steps: int, every: int, method: dict[str, Any], ranks: int = 1, stage: int = 2) -> dict[str, Any]:
    return job_body(
        optimisation={"steps": steps, "evaluate_every": every, "evaluation_sequences": 16},
        checkpoints={"every": every, "keep": 2},
        resources={"processes": ranks},
        deepspeed={"zero_stage": stage},
    ) | {"method": method}


# Each trains for some seconds, so that most faults find it at work.
SPECS: dict[str, dict[str, Any]] = {
    "galore": _body(300, 30, {"name": "galore", "rank": 16, "period": 20}),
    "full": _body(240, 40, {"name": "full"}),
    "golore": _body(200, 50, {"name": "golore", "rank": 8, "period": 25}, stage=0),
    "galore-two-ranks": _body(160, 20, {"name": "galore", "rank": 16, "period": 20}, ranks=2),
    "full-two-ranks": _body(120, 30, {"name": "full"}, ranks=2, stage=3),
}
TWO_RANKS = tuple(name for name, body in SPECS.items() if body["resources"]["processes"] == 2)


@dataclass(frozen=True)
class Curve:
    """(step, loss) of every step, and of every evaluation."""

    points: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        return self.points[-1][0] if self.points else 0


def curve_of(metrics: dict[str, Any]) -> Curve:
    """Of an answer of GET /v1/jobs/{id}/metrics."""
    assert not metrics["has_more"]
    return Curve(*(tuple((row["step"], row["loss"]) for row in metrics[key]) for key in ("points", "evaluations")))


def undisturbed(names: Iterable[str], home: Path, cache: Path) -> dict[str, Curve]:
    """The curve of each, from `cache` or trained now in a quiet stack at `home`.

    What is cached counts only for this very trainer.
    """
    cache.mkdir(parents=True, exist_ok=True)
    files = {name: cache / f"{name}-{_fingerprint(SPECS[name])}.json" for name in dict.fromkeys(names)}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        with running(home, workers=2) as service:
            ids = {name: service.submit_body(SPECS[name]) for name in missing}
            for name, job_id in ids.items():
                service.wait(job_id, "succeeded")
                metrics = service.http.get(f"/v1/jobs/{job_id}/metrics?limit=10000").json()
                files[name].write_text(json.dumps(metrics))
    return {name: curve_of(json.loads(file.read_text())) for name, file in files.items()}


def _fingerprint(body: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for file in sorted(Path(trainer.__path__[0]).rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(version("torch").encode())
    return digest.hexdigest()[:16]
