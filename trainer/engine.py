"""TrainingSpec → DeepSpeed engine. The only place that knows DeepSpeed's configuration dictionary."""

from typing import Any

import deepspeed
import torch
from torch import nn

from trainer.config import TrainingSpec
from trainer.methods.base import Method


def configuration(spec: TrainingSpec) -> dict[str, Any]:
    """The dictionary, complete: what is left out gets DeepSpeed's defaults, and some of those surprise."""
    optimisation, micro = spec.optimisation, spec.optimisation.micro_batch
    assert micro is not None
    zero: dict[str, Any] = {"stage": spec.deepspeed.zero_stage}
    if spec.deepspeed.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    # Sums of bf16 gradients in fp32. At stage 1 DeepSpeed would change to an optimizer of another kind for it.
    types = {"grad_accum_dtype": "fp32"} if optimisation.dtype == "bf16" and spec.deepspeed.zero_stage >= 2 else {}
    return {
        "data_types": types,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": optimisation.global_batch // (micro * spec.resources.processes),
        "zero_optimization": zero,
        "bf16": {"enabled": optimisation.dtype == "bf16"},
        # Without the key DeepSpeed clips at 1.0.
        "gradient_clipping": optimisation.clip_norm,
        # torch's own AdamW everywhere: nothing is compiled at the start, and a resumed run is bit-equal.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(spec: TrainingSpec, model: nn.Module, method: Method) -> Any:
    """The engine around `model`, to which `method` has been attached. torch.distributed must be initialised."""
    optimisation = spec.optimisation
    groups = [group for group in method.parameter_groups(model) if group["params"]]
    # The rates are set before every step; see Run.train_step.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimisation.betas, eps=optimisation.epsilon)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=configuration(spec), dist_init_required=False
    )
    return engine
