"""On two ranks, at every stage that shards, a classification is that of one: losses, and metrics of all held out."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.case import read_json
from tests.distributed.group import run_group
from tests.trainer.classify.made import make_run, spec
from tests.trainer.classify.test_training import SETTINGS
from trainer import events

pytestmark = pytest.mark.usefixtures("process_group")

# (method, stage, micro-batch): of the 15 held-out examples the ranks have different numbers of batches.
CASES = [("galore", 1, 4), ("galore_plus", 2, 2), ("loro", 3, 2), ("lora", 3, 1)]


def changes(name: str, stage: int, micro: int) -> dict[str, Any]:
    return {
        "method": {"name": name} | SETTINGS[name],
        "deepspeed": {"zero_stage": stage},
        "optimisation": {"micro_batch": micro, "epsilon": 1e-4},
    }


def test_two_ranks_learn_and_measure_what_one_does(tmp_path: Path) -> None:
    cases = []
    for case in CASES:
        wanted = spec(tmp_path, **changes(*case), resources={"processes": 2})
        cases.append({"directory": str(tmp_path / case[0]), "spec": wanted.model_dump(mode="json"), "steps": 4})
    run_group(tmp_path, 2, cases)
    for case in CASES:
        told = read_json(tmp_path / case[0] / "answer.json")["events"]
        run, found = make_run(tmp_path / f"{case[0]}-alone", **changes(*case))
        for _ in range(4):
            run.train_step(lambda: False)
        run.evaluate()
        alone = [event for event in found if isinstance(event, events.Step)]
        together = [event for event in told if event["type"] == "step"]
        assert [e["loss"] for e in together] == pytest.approx([e.loss for e in alone], abs=2e-5)
        assert [e["accuracy"] for e in together] == [e.accuracy for e in alone]
        (mine,) = [event for event in found if isinstance(event, events.Evaluated)]
        (theirs,) = [event for event in told if event["type"] == "evaluated"]
        assert theirs["sequences"] == mine.sequences == 15
        assert theirs["loss"] == pytest.approx(mine.loss, abs=2e-5)
        assert theirs["metrics"] == pytest.approx(mine.metrics)
