"""Bytes that a rank holds and sends, counted while it works; what each rank of a group runs for test_bytes.py.

python -m torch.distributed.run --nproc-per-node N -m tests.distributed.measure CASES.json
"""

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.engine
from tests.distributed.rank import merged, real_configuration
from trainer.assemble import assemble
from trainer.config import TrainingSpec
from trainer.engine import sharder
from trainer.lowrank.adapted import OnModule
from trainer.lowrank.switch import _Choosing
from trainer.methods import make_method
from trainer.methods.base import StepContext
from trainer.prepare import prepare
from trainer.process import leave
from trainer.run import Run
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer
from trainer.train import distributed


class Sent(TorchDispatchMode):
    """Counts what is handed to torch.distributed: bytes of the inputs, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            # The gathering ones name their output first.
            given = args[1] if "gather" in name or "reduce_scatter" in name else args[0]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors(given))
        return func(*args, **(kwargs or {}))

    @property
    def reduced(self) -> int:
        return sum(count for name, count in self.bytes.items() if "reduce" in name)

    @property
    def gathered(self) -> int:
        return sum(count for name, count in self.bytes.items() if "gather" in name)


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in tensors(item)]


class Held:
    """The most that was held at one of the moments when it was looked at. What the allocator says would include what
    gloo's threads have not let go of yet."""

    def __init__(self) -> None:
        self.parameters = self.gradients = 0

    def look_at_parameters(self, model: torch.nn.Module) -> None:
        """Bytes of the parameters' own values and of their shards."""
        values = [p for p in model.parameters() if not p.is_meta]
        shards = [p.ds_tensor for p in values if hasattr(p, "ds_tensor")]
        self.parameters = max(self.parameters, sum(t.numel() * t.element_size() for t in [*values, *shards]))

    def look_at_gradients(self, shapes: set[tuple[int, int]]) -> None:
        """Bytes of all float32 matrices of the targets' shapes that are no parameters, nor values of one."""
        found = {
            o.untyped_storage().data_ptr(): o.numel() * 4
            for o in gc.get_objects()
            if type(o) is torch.Tensor and o.dtype == torch.float32 and tuple(o.shape) in shapes
        }
        self.gradients = max(self.gradients, sum(found.values()))


def measure(case: dict[str, Any]) -> dict[str, Any]:
    spec, rundir = TrainingSpec.model_validate(case["spec"]), RunDir(case["directory"])
    prepare(spec, rundir, dist.get_rank(), lambda _: None, lambda: False)
    trainer.engine.configuration = lambda s: merged(real_configuration(s), case["deepspeed"])
    answer: dict[str, Any] = {}
    held = Held()

    def looking(model: torch.nn.Module) -> OnModule:
        shard = sharder(spec, model)

        def look_and_shard(module: torch.nn.Module) -> None:
            held.look_at_parameters(model)
            shard(module)

        return look_and_shard

    _, parameters = assemble(spec, byte_tokenizer(), make_method(spec), sharding=looking)
    answer |= {"assembling": held.parameters, "parameters": parameters}

    run = Run(spec, rundir, lambda _: None)
    for _ in range(case["steps"]):
        run.train_step(lambda: False)
    batches = run.task.micro_batches(run.step)
    context = StepContext(run.step, 1e-3, run.model, run.shards, batches)
    shapes = {layer.shape for layer in run.method.layers}
    real_take, held = _Choosing.take, Held()

    def take_and_look(*arguments: Any) -> None:
        held.look_at_gradients(shapes)
        held.look_at_parameters(run.model)
        real_take(*arguments)

    # What is there already need not be looked through again and again.
    gc.collect()
    gc.freeze()
    _Choosing.take = take_and_look
    run.method.before_step(context)
    _Choosing.take = real_take
    gc.unfreeze()
    answer |= {"switching": held.gradients, "gathered_at_a_switch": held.parameters}
    sent = Sent()
    with sent:
        for index, batch in enumerate(batches):
            run.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            run.engine.backward(run.engine(**batch.inputs).loss)
            run.engine.step()
    answer |= {"reduced": sent.reduced, "gathered": sent.gathered, "operations": dict(sent.bytes)}
    return answer


if __name__ == "__main__":
    file = Path(sys.argv[1])
    with distributed():
        answers = [measure(case) for case in json.loads(file.read_text())]
        file.with_suffix(f".rank{os.environ['RANK']}").write_text(json.dumps(answers))
        dist.barrier()
    leave(0)
