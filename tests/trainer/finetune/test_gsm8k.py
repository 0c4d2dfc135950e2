"""A real data set: GSM8K (Cobbe et al. 2021), where it is at hand. It is looked for in STIEFEL_TEST_DATA."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.datasets import GSM8K
from tests.trainer.finetune import made
from trainer import events
from trainer.config import TrainingSpec
from trainer.exports.export import export
from trainer.finetune.task import ExampleTask
from trainer.run import Run
from trainer.rundir import RunDir

STEPS = 20
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(not GSM8K.exists(), reason=f"there is no {GSM8K}"),
]


def test_the_loss_falls_on_answers_to_word_problems(tmp_path: Path) -> None:
    wanted = TrainingSpec.model_validate(
        {
            "task": "finetune",
            "model": "llama-tiny",
            "dataset": {
                "source": "examples",
                "files": [str(GSM8K)],
                "columns": {"prompt": "question", "completion": "answer"},
                "sequence_length": 512,
                "truncation": "drop",
                "validation_fraction": 0.01,
                "examples": 7473,
            },
            "method": {"name": "galore", "rank": 16, "period": 10},
            "optimisation": {
                "steps": STEPS,
                "global_batch": 8,
                "micro_batch": 4,
                "learning_rate": 0.02,
                "others": "trained",
                "evaluation_sequences": 16,
            },
        }
    )
    rundir = RunDir(tmp_path / "run")
    told = made.make(wanted, rundir)
    (prepared,) = [event for event in told if isinstance(event, events.Prepared)]
    assert prepared.examples + prepared.held_out + prepared.left_out == 7473
    assert prepared.left_out < 4000 and prepared.trained_tokens < prepared.tokens
    run = Run(wanted, rundir, told.append)
    run.evaluate()
    while run.step < STEPS:
        run.train_step(lambda: False)
    run.evaluate()
    before, after = (event for event in told if isinstance(event, events.Evaluated))
    assert after.loss < 0.75 * before.loss
    assert before.accuracy is not None and after.accuracy is not None
    assert after.accuracy > before.accuracy + 0.1

    run.save()
    rundir.spec.write_text(wanted.model_dump_json())
    export(rundir, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(run.task, ExampleTask)
    loss, learnt = 0.0, 0
    with torch.no_grad():
        for number in list(run.task.held_out)[:16]:
            ids, marks = (torch.tensor(np.asarray(part, dtype=np.int64)) for part in run.task.prepared[number])
            labels = torch.where(marks != 0, ids, -100)
            count = int((labels[1:] != -100).sum())
            loss += float(model(input_ids=ids[None], labels=labels[None]).loss) * count
            learnt += count
    assert loss / learnt == pytest.approx(after.loss, rel=1e-5)
