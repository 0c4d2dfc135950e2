"""Every method learns: the loss of a small LLaMA on real text, Python's own source, comes down and stays down."""

from pathlib import Path
from statistics import fmean

import pytest

from tests.trainer.alone import make_run
from trainer import events
from trainer.files import stdlib_files
from trainer.methodconfig import METHOD_CONFIGS

pytestmark = pytest.mark.usefixtures("process_group")

STEPS = 40
# What is tuned for long runs of large models may be slow here.
QUICKER = {"full": 3e-3, "gasare": 3e-3, "gosare": 3e-3, "lora": 3e-3, "dora": 3e-3, "relora": 3e-3, "lowrank": 3e-3}


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_the_loss_on_real_text_comes_down(tmp_path: Path, name: str) -> None:
    config = METHOD_CONFIGS[name]
    quick = {"period": 10, "residual_warmup": 10, "restart_warmup": 3, "random_fraction": 0.5}
    quick = {key: value for key, value in quick.items() if key in config.model_fields}
    run, found = make_run(
        tmp_path,
        method={"name": name} | quick,
        dataset={"source": "text", "files": [str(file) for file in stdlib_files()[:40]], "sequence_length": 64},
        optimisation={
            "steps": STEPS,
            "global_batch": 16,
            "learning_rate": QUICKER.get(name, config.default_learning_rate),
            "warmup_steps": 4,
            "epsilon": 1e-8,
        },
        deepspeed={"zero_stage": 0},
    )
    for _ in range(STEPS):
        run.train_step(lambda: False)
    losses = [e.loss for e in found if isinstance(e, events.Step)]
    assert losses[0] == pytest.approx(5.55, abs=0.3), "ln 257: nothing is known at first"
    assert fmean(losses[-5:]) < 4.2
