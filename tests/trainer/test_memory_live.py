"""The calculator against live tensors: for every method, each kind of element and byte as counted on a model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import spec as make_spec
from tests.trainer.test_exact import CASES, settings
from trainer.batch import Batch
from trainer.config import TrainingSpec
from trainer.engine import PlainEngine
from trainer.lowrank.residual import ResidualLinear
from trainer.memory import elements, memory, model_of
from trainer.methods import make_method
from trainer.model import build_model
from trainer.presets import PRESETS
from trainer.tokenizer import byte_tokenizer
from trainer.update import update
from trainer.zero import Shards

pytestmark = pytest.mark.usefixtures("process_group")

# Fine-tuning needs a pretrained model; the others are counted from a preset.
LIVE = [case for case in CASES if case != "loro-fine-tuning"]


def spec_for(directory: Path, case: str) -> TrainingSpec:
    return make_spec(
        directory, method=settings(case), optimisation={"steps": 10, "global_batch": 2}, resources={"processes": 1}
    )


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("case", LIVE)
def test_what_is_calculated_is_what_there_is(tmp_path: Path, case: str) -> None:
    spec = spec_for(tmp_path, case)
    model = build_model(spec, byte_tokenizer())
    shape = model_of(PRESETS["llama-tiny"], vocabulary=model.config.vocab_size)
    method = make_method(spec)
    method.attach(model)
    engine = PlainEngine(spec, model, method)
    shards = Shards(engine)

    gradient_bytes: list[int] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: gradient_bytes.append(size(p.grad for p in model.parameters() if p.grad is not None))
    )
    tokens = torch.arange(16).view(2, 8)
    for step in range(2):
        update(engine, method, shards, step, 1e-3, [Batch.of_tokens(tokens)])

    trained = [p for p in model.parameters() if p.requires_grad]
    fixed = [p for p in model.parameters() if not p.requires_grad]
    buffers = [b for layer in method.layers for b in layer.buffers()]
    index = [p for p in fixed if p.dtype == torch.int32]
    moments = [state[key] for p, state in engine.optimizer.state.items() for key in shards.moments_of(p)]

    counted = elements(spec.method, shape)
    assert sum(p.numel() for p in trained) == counted.trained
    assert sum(p.numel() for p in fixed) == counted.frozen + counted.basis + counted.index
    assert sum(m.numel() for m in moments) == counted.moments
    assert sum(b.numel() for b in index) == counted.index
    assert sum(b.numel() for b in buffers) == counted.residual

    found = memory(spec.method, shape, dtype="fp32", zero_stage=0)
    assert found.host.total == 0
    assert found.device.weights + found.device.basis == size(model.parameters())
    assert found.device.buffers == size(buffers)
    assert found.device.gradients == gradient_bytes[-1]
    assert found.device.moments == size(moments) == shards.state_bytes()


def test_only_galore_plus_has_residual_buffers(tmp_path: Path) -> None:
    """Nothing else keeps anything of its own beside parameters, moments and indices: the count above is complete."""
    for case in LIVE:
        spec = spec_for(tmp_path, case)
        method = make_method(spec)
        method.attach(build_model(spec, byte_tokenizer()))
        for layer in method.layers:
            kept = {name: v for name, v in vars(layer).items() if isinstance(v, torch.Tensor)}
            assert not kept, (case, kept)
            floating = [b for b in layer.buffers() if b.is_floating_point()]
            assert bool(floating) == isinstance(layer, ResidualLinear)
