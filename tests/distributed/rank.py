"""What each rank of a group runs: every case of a list, one after the other, in one process group.

python -m torch.distributed.run --nproc-per-node N -m tests.distributed.rank CASES.json

Starting processes and importing torch costs far more than training a tiny model, so one group serves many cases.
"""

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

import trainer.engine
from tests.distributed.case import save_arrays
from tests.reference.product import effective_weights
from trainer.config import TrainingSpec
from trainer.prepare import prepare
from trainer.process import leave
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.train import distributed

real_configuration = trainer.engine.configuration


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return base | {key: base.get(key, {}) | value for key, value in more.items()}


def live_bytes(run: Run) -> dict[str, int]:
    """What this rank holds: parameters as they are sharded, fp32 masters, moments, buffers of the method's layers."""

    def size(tensors: Iterable[Any]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    masters = [master for _, master in run.shards._masters()]
    states = [state for _, state in run.shards._states()]
    return {
        "parameters": size(getattr(p, "ds_tensor", p) for p in run.model.parameters()),
        "masters": (size(masters) if run.spec.deepspeed.zero_stage else 0) + run.shards.frozen_master_bytes(),
        "moments": size(value for state in states for key, value in state.items() if key != "step"),
        "buffers": size(buffer for layer in run.method.layers for buffer in layer.buffers()),
    }


def train(case: dict[str, Any]) -> None:
    """Train `steps` steps; at each of `save_at`, write a checkpoint and go on with a new engine made from it.

    After every `evaluate_every` steps it is evaluated, besides the end. `deepspeed` is merged into DeepSpeed's own
    configuration.
    """
    rundir = RunDir(case["directory"])
    events: list[Any] = []
    wanted = TrainingSpec.model_validate(case["spec"])
    prepare(wanted, rundir, dist.get_rank(), events.append, lambda: False)
    trainer.engine.configuration = lambda s: merged(real_configuration(s), case.get("deepspeed", {}))
    run = Run(wanted, rundir, events.append)
    while run.step < case["steps"]:
        run.train_step(lambda: False)
        if run.step < case["steps"] and run.step % case.get("evaluate_every", case["steps"]) == 0:
            run.evaluate()
        if run.step in case.get("save_at", []):
            run.save()
            run = Run(TrainingSpec.model_validate(case.get("resume_as", case["spec"])), rundir, events.append)
    run.evaluate()
    weights = {
        name: value.float().cpu() for name, value in effective_weights(run.model, run.method, run.shards).items()
    }
    state_bytes = run.shards.state_bytes()
    if dist.get_rank() == 0:
        save_arrays(rundir.root / "weights.npz", weights)
        answer = {"events": [json.loads(e.model_dump_json()) for e in events], "state_bytes": state_bytes}
        answer["live"] = live_bytes(run)
        (rundir.root / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    with distributed():
        # DeepSpeed collects garbage at every start of an engine; what is imported is none.
        gc.collect()
        gc.freeze()
        for wanted in json.loads(Path(sys.argv[1]).read_text()):
            train(wanted)
            dist.barrier()
    leave(0)
