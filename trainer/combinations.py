"""What cannot be combined, and why: data type, ZeRO stage, offloading, merging. Imports no torch.

docs/zero.md lists the same; a test holds the two together.
"""

from typing import Literal, Protocol

from trainer.methodconfig import MethodConfig, ReloraConfig, SLTrainConfig, SparseSettings, SubspaceSettings

# Elements: in no type a mebibyte, from which on DeepSpeed keeps a shard in a file.
_LARGEST_PERSISTED = 2**18 - 1


class Precision(Protocol):
    """Of `trainer.config.Optimisation`."""

    @property
    def steps(self) -> int | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def merge(self) -> str: ...
    @property
    def form(self) -> Literal["auto", "merged", "factored"]: ...


class Sharding(Protocol):
    """Of `trainer.config.DeepSpeedSpec`."""

    @property
    def zero_stage(self) -> int: ...
    @property
    def offload(self) -> str: ...
    @property
    def offload_parameters(self) -> str: ...
    @property
    def nvme_path(self) -> str | None: ...
    @property
    def persistence_threshold(self) -> int: ...


def combination_problem(method: MethodConfig, precision: Precision, sharding: Sharding) -> tuple[str, str] | None:
    """(field, message) for the first thing that cannot be, or None."""
    stage, bf16 = sharding.zero_stage, precision.dtype == "bf16"
    if bf16 and stage == 0:
        return (
            "deepspeed.zero_stage",
            "zero_stage 0 with dtype bf16 keeps no fp32 master weights that a switch could reset; "
            "use zero_stage 1, 2 or 3, or dtype fp32",
        )
    if sharding.offload != "none" and stage == 0:
        return (
            "deepspeed.offload",
            f"offload {sharding.offload} needs zero_stage 1, 2 or 3, stage 0 shards nothing; use one of them, or none",
        )
    if sharding.offload == "nvme" and stage != 3:
        return "deepspeed.offload", f"offload nvme is for zero_stage 3 alone, not {stage}; use cpu, or zero_stage 3"
    if sharding.offload_parameters != "none" and stage != 3:
        return (
            "deepspeed.offload_parameters",
            f"zero_stage {stage} keeps parameters whole on every device; use zero_stage 3, or leave it out",
        )
    if "nvme" in (sharding.offload, sharding.offload_parameters) and not sharding.nvme_path:
        return "deepspeed.nvme_path", "nvme needs a directory for its files; give nvme_path"
    if sharding.offload_parameters == "nvme" and sharding.persistence_threshold > _LARGEST_PERSISTED:
        return (
            "deepspeed.persistence_threshold",
            "parameters that stay whole on every rank must not be in files; with offload_parameters nvme use at most "
            f"{_LARGEST_PERSISTED}, not {sharding.persistence_threshold}",
        )
    if sharding.offload_parameters == "nvme" and isinstance(method, SparseSettings | SLTrainConfig):
        return (
            "deepspeed.offload_parameters",
            f"{method.name} has integer parameters, its entries' places, and DeepSpeed's files hold one type; use cpu",
        )
    if bf16 and stage == 1 and method.large_switches(precision.steps or 0)[0] > 1:
        return (
            "method.switch_batches",
            "a large switch at zero_stage 1 would add its gradients up in bf16, and lose digits; use zero_stage 2 or 3",
        )
    if precision.form != "auto" and not isinstance(method, SubspaceSettings):
        return "optimisation.form", f"{method.name} learns in no subspace that could be {precision.form}; leave it out"
    return _merge_problem(method, precision)


def form_of(method: MethodConfig, precision: Precision, sharding: Sharding) -> Literal["auto", "merged", "factored"]:
    """`optimisation.form` where the run names none; see docs/decisions/0021 for why."""
    if precision.form != "auto" or not isinstance(method, SubspaceSettings):
        return precision.form
    return "merged" if precision.dtype == "fp32" and sharding.offload_parameters == "none" else "factored"


def _merge_problem(method: MethodConfig, precision: Precision) -> tuple[str, str] | None:
    if precision.merge == "nearest":
        return None
    if precision.dtype == "fp32":
        return (
            "optimisation.merge",
            f"merge {precision.merge} is for dtype bf16: in fp32 a merge loses nothing; leave it out",
        )
    if not isinstance(method, SubspaceSettings | ReloraConfig):
        return (
            "optimisation.merge",
            f"{method.name} merges nothing into frozen weights; leave {precision.merge} out",
        )
    return None
