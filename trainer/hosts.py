"""A run on several hosts: the same training on as many ranks as torchrun has brought together. Imports no torch."""

from trainer.config import TrainingSpec
from trainer.errors import SpecError
from trainer.rundir import RunDir


def for_ranks(spec: TrainingSpec, ranks: int) -> TrainingSpec:
    """The same global batches in the same order, on another number of ranks.

    micro_batch becomes the largest divisor of a rank's share that is at most the spec's: no rank needs more memory for
    activations than was asked for. Raises SpecError where the global batch does not divide.
    """
    if ranks == spec.resources.ranks:
        return spec
    batch, micro = spec.optimisation.global_batch, spec.optimisation.micro_batch
    assert micro is not None
    if ranks < 1 or batch % ranks:
        raise SpecError(
            f"optimisation.global_batch: {batch} does not divide by {ranks} ranks; "
            f"choose a multiple of {max(1, ranks)}, or another number of ranks"
        )
    share = batch // ranks
    largest = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    processes = spec.resources.processes
    hosts, processes = (1, ranks) if ranks % processes else (ranks // processes, processes)
    resources = {"hosts": hosts, "min_hosts": hosts, "processes": processes}
    return spec.model_copy(
        update={
            "optimisation": spec.optimisation.model_copy(update={"micro_batch": largest}),
            "resources": spec.resources.model_copy(update=resources),
        }
    )


def for_world(spec: TrainingSpec, world: int) -> TrainingSpec:
    """What `world` ranks are to train; SpecError where the spec does not allow as many."""
    resources = spec.resources
    if world not in resources.allowed_ranks:
        allowed = " or ".join(str(ranks) for ranks in resources.allowed_ranks)
        raise SpecError(
            f"resources.hosts: {world} ranks were started, but {_hosts(spec)} hosts × processes {resources.processes} "
            f"are {allowed}; start torchrun with {_sizes(spec)}, or change hosts, min_hosts or processes"
        )
    return for_ranks(spec, world)


def torchrun_needed(spec: TrainingSpec, rundir: RunDir) -> SpecError:
    """What to do with a spec of several hosts, to somebody who started the trainer without torchrun."""
    return SpecError(
        f"resources.hosts: {spec.resources.hosts} hosts are started by torchrun. On each of them run\n\n"
        f"  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun {_sizes(spec)} --max-restarts 3 "
        f"--rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29400 --rdzv-id {rundir.root.resolve().name} "
        f"-m trainer run {rundir.root}\n\n"
        "with the name of one of them for FIRST_HOST; docs/multi-node.md says what they must share"
    )


def _hosts(spec: TrainingSpec) -> str:
    fewest, most = spec.resources.fewest_hosts, spec.resources.hosts
    return str(most) if fewest == most else f"{fewest}:{most}"


def _sizes(spec: TrainingSpec) -> str:
    return f"--nnodes {_hosts(spec)} --nproc-per-node {spec.resources.processes}"
