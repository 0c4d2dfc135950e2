"""TrainingSpec → DeepSpeed engine. The only place that knows DeepSpeed's configuration dictionary."""

from typing import Any

import deepspeed
import torch
from torch import nn

from trainer import nvme
from trainer.config import DeepSpeedSpec, TrainingSpec
from trainer.lowrank.adapted import OnModule, leave
from trainer.methods.base import Method
from trainer.model import DTYPES
from trainer.optimizer import Rules
from trainer.zero import shape_of

_LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's own default
_GROUP = 2**24  # elements: 64 MB of a moment


def configuration(spec: TrainingSpec) -> dict[str, Any]:
    """The dictionary, complete: what is left out gets DeepSpeed's defaults, and some of those surprise."""
    optimisation, micro = spec.optimisation, spec.optimisation.micro_batch
    assert micro is not None
    zero = {"stage": spec.deepspeed.zero_stage} | _offloading(spec.deepspeed)
    if spec.deepspeed.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = spec.deepspeed.persistence_threshold
    # Sums of bf16 gradients in fp32. At stage 1 DeepSpeed would change to an optimizer of another kind for it.
    types = {"grad_accum_dtype": "fp32"} if optimisation.dtype == "bf16" and spec.deepspeed.zero_stage >= 2 else {}
    largest = spec.method.large_switches(optimisation.steps or 0)[0]
    return {
        "data_types": types,
        "train_micro_batch_size_per_gpu": micro,
        # At most: the loop tells the engine where a step ends. With 1, offloading would keep no sums at all.
        "gradient_accumulation_steps": largest * optimisation.global_batch // (micro * spec.resources.ranks),
        "zero_optimization": zero,
        "bf16": {"enabled": optimisation.dtype == "bf16"},
        # Without the key DeepSpeed clips at 1.0.
        "gradient_clipping": optimisation.clip_norm,
        # torch's own arithmetic everywhere: nothing is compiled at the start, and a resumed run is bit-equal.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _offloading(spec: DeepSpeedSpec) -> dict[str, Any]:
    """The part of `zero_optimization` that says where state and parameters wait for their use."""
    files = {"nvme_path": spec.nvme_path}
    found: dict[str, Any] = {}
    if spec.offload != "none":
        found["offload_optimizer"] = {"device": spec.offload}
    if spec.offload == "nvme":
        found["offload_optimizer"] |= files
        # What is in memory at a time: by default groups of 10⁹ elements, and four locked buffers of the largest.
        found["sub_group_size"] = _GROUP
    if spec.offload_parameters != "none":
        found["offload_param"] = {"device": spec.offload_parameters}
    if spec.offload_parameters == "nvme":
        # The copy of what is trained is in memory however large it is: `Shards` writes into it.
        found["offload_param"] |= files | {"max_in_cpu": 10**15}
        # Buffers are few. A parameter that waits for its next use would keep one, and so would one that is read ahead
        # for the backward pass, after a forward pass that has none (held-out losses).
        found |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return found


def sharder(spec: TrainingSpec, model: nn.Module) -> OnModule:
    """What shards a module of `model`, which is being assembled, as soon as the module has its values (stage 3)."""
    if spec.deepspeed.zero_stage < 3:
        return leave
    settings = configuration(spec)
    if spec.deepspeed.offload_parameters == "nvme":
        sizes = [parameter.numel() for parameter in model.parameters()]
        width = DTYPES[spec.optimisation.dtype].itemsize
        nvme.check_room(spec.deepspeed, sum(sizes) * width // spec.resources.hosts, "parameters")
        # A buffer holds the shard of one parameter; no method adds a larger one than the model has.
        settings["zero_optimization"]["offload_param"]["buffer_size"] = -(-max(sizes) // spec.resources.ranks)
    swapper = None

    def shard(module: nn.Module) -> None:
        nonlocal swapper
        if any(not hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            init = deepspeed.zero.Init(module=module, config_dict_or_path=settings, param_swapper=swapper)
            swapper = init.param_swapper

    return shard


def build_engine(spec: TrainingSpec, model: nn.Module, method: Method) -> Any:
    """The engine around `model`, to which `method` has been attached. torch.distributed must be initialised."""
    settings = configuration(spec)
    trained = sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)
    # DeepSpeed sets aside a buffer for so many gradients, by default two gigabytes in fp32, however few there are.
    settings["zero_optimization"]["reduce_bucket_size"] = min(_LARGEST_BUCKET, trained)
    if spec.deepspeed.offload == "nvme":
        # Master, two moments, gradient.
        nvme.check_room(spec.deepspeed, 4 * 4 * trained // spec.resources.hosts, "optimizer's state")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(spec, model, method),
        config=settings,
        dist_init_required=False,
    )
    return engine


def make_optimizer(spec: TrainingSpec, model: nn.Module, method: Method) -> Rules:
    """The rates are set before every step; see trainer.update."""
    groups = [group for group in method.parameter_groups(model) if group["params"]]
    return Rules(groups, spec.optimisation.betas, spec.optimisation.epsilon)


class PlainEngine:
    """What the loop uses of a DeepSpeed engine, without DeepSpeed: one process, any type, float64 too.

    For problems that are no language models (benchmarks.counterexample), and for tests that need more digits than any
    sharded engine has. Gradients are not clipped.
    """

    def __init__(self, spec: TrainingSpec, model: nn.Module, method: Method) -> None:
        self.module = model
        self.optimizer = make_optimizer(spec, model, method)
        self.device = next(model.parameters()).device
        self._boundary = True
        self._accumulation = 1

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self._boundary = boundary

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._boundary

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own

    def step(self) -> None:
        if self._boundary:
            self.optimizer.step()
            self.optimizer.zero_grad()
