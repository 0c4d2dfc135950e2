"""What a method keeps from step to step, counted: elements of each kind, bytes of each rank. Imports no torch.

    split, elements   how many numbers a method keeps for a model, exactly, kind by kind
    memory            the bytes of one rank, on the device and on the host, by data type, ZeRO stage and offload
    published         the bytes that a paper's table counts for the same elements

Not counted: activations; what a step or a switch holds for a moment (a probe's full gradients, a decomposition, stage
3's gathered parameters, DeepSpeed's buckets); padding to equal shards; the full copies that stage 3 keeps of small
parameters (below 100,000 elements); the model's own buffers, such as rotary tables. A bias is no
target, whatever its matrix becomes.
"""

from dataclasses import astuple, dataclass
from typing import Literal, Self, assert_never

from trainer import methodconfig as methods
from trainer.errors import SpecError
from trainer.methodconfig import entry_count
from trainer.presets import ALL_LINEAR, HEAD_TARGETS, Shape

# ------------------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Matrix:
    """`count` matrices m×n that have the same last part of their module's name.

    `part`: of the repeated blocks; of a new classification head; or an end, which an embedding is.
    """

    name: str
    rows: int
    columns: int
    count: int = 1
    part: Literal["block", "head", "end"] = "block"


@dataclass(frozen=True)
class Model:
    """Every parameter once: a shared one is in `matrices` under one of its names.

    `vectors`: elements of norms and biases, `head_vectors` those of a classification head. `pretrained`: its weights
    were loaded, so no method may drop them.
    """

    matrices: tuple[Matrix, ...]
    vectors: int = 0
    head_vectors: int = 0
    pretrained: bool = False

    @property
    def parameters(self) -> int:
        return (
            sum(matrix.rows * matrix.columns * matrix.count for matrix in self.matrices)
            + self.vectors
            + self.head_vectors
        )


def model_of(shape: Shape, vocabulary: int, tied: bool = False) -> Model:
    """A LLaMA of this shape; `tied`: the head is the embedding."""
    ends = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    return Model(
        matrices=(
            *(Matrix(name, *sides, shape.layers) for name, sides in shape.target_sides().items()),
            *(Matrix(name, vocabulary, shape.hidden, part="end") for name in ends),
        ),
        vectors=(2 * shape.layers + 1) * shape.hidden,
    )


# ---------------------------------------------------------------------------------------------------------- elements


@dataclass(frozen=True)
class _Counts:
    """Numbers by kind, added kind by kind."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: int) -> Self:
        return type(self)(*(count * a for a in astuple(self)))


@dataclass(frozen=True)
class Elements(_Counts):
    """How many numbers of each kind.

    frozen    full-size weights that no gradient reaches
    trained   everything with a gradient; `core` of it is merged into frozen weights at a switch: in the papers' form,
              where W itself is updated, it does not exist
    basis     fixed factors, stored as parameters
    moments   of the optimizer
    index     places of entries, stored as int32 parameters
    residual  GaLore+'s residual and its moments, float32 buffers
    """

    frozen: int = 0
    trained: int = 0
    core: int = 0
    basis: int = 0
    moments: int = 0
    index: int = 0
    residual: int = 0


Others = Literal["trained", "frozen"]


def elements(settings: methods.MethodConfig, model: Model, beside: Others = "trained") -> Elements:
    """Of the whole model. Raises SpecError where a target is missing, or the rank, or it is above a target's side."""
    targets, others = split(settings, model, beside)
    return targets + others


def split(settings: methods.MethodConfig, model: Model, beside: Others = "trained") -> tuple[Elements, Elements]:
    """(of the method's targets, of all beside them). Raises as `elements`.

    `beside`: what becomes of the latter; the run's `optimisation.others`. AdamW trains it in full, or it is frozen, but
    for a classification head, which is always trained. Full training, whose optimizer is a setting, has every matrix
    for a target.
    """
    targets = _targets(settings, model)
    of_targets, of_others = Elements(), _beside(model.vectors, beside) + _adam(model.head_vectors)
    for matrix in model.matrices:
        if matrix in targets:
            of_targets += _of_target(settings, matrix, model.pretrained) * matrix.count
        else:
            fate = "trained" if matrix.part == "head" else beside
            of_others += _beside(matrix.rows * matrix.columns, fate) * matrix.count
    return of_targets, of_others


def _targets(settings: methods.MethodConfig, model: Model) -> list[Matrix]:
    if isinstance(settings, methods.FullConfig):
        return list(model.matrices)
    if settings.targets == (ALL_LINEAR,):
        return [matrix for matrix in model.matrices if matrix.part == "block"]
    names = {matrix.name for matrix in model.matrices}
    if unknown := set(settings.targets) - names:
        raise SpecError(f"method.targets: no matrix is called {min(unknown)!r}; this model has {sorted(names)}")
    return [matrix for matrix in model.matrices if matrix.name in settings.targets and matrix.part != "head"]


def _beside(count: int, fate: Others) -> Elements:
    return _adam(count) if fate == "trained" else Elements(frozen=count)


def _of_target(settings: methods.MethodConfig, matrix: Matrix, pretrained: bool) -> Elements:
    m, n = matrix.rows, matrix.columns
    r = _rank(settings, matrix) if isinstance(settings, methods.RankedSettings) else 0
    match settings:
        case methods.FullConfig():
            return Elements(trained=m * n, moments=_moments(settings.optimizer) * m * n)
        case methods.GaLorePlusConfig() if _has_heads(settings, matrix):
            # Always right. The collector, two numbers for each of k entries, has gradients but no moments.
            k = entry_count(settings.residual_density, m, n) if settings.residual_density > 0 else 0
            residual = Elements(trained=2 * k, core=2 * k, index=k, residual=3 * k)
            return _subspace(settings.optimizer, m * n, core=r * m) + Elements(basis=r * n) + residual
        case methods.GaLoreConfig() | methods.GoLoreConfig() | methods.GaLorePlusConfig():
            # Left when m ≤ n: the basis has the smaller side, the core the larger.
            return _subspace(settings.optimizer, m * n, core=r * max(m, n)) + Elements(basis=r * min(m, n))
        case methods.FloraConfig():
            return _subspace(settings.optimizer, m * n, core=r * max(m, n))
        case methods.GaRareConfig():
            # Always left.
            return _subspace(settings.optimizer, m * n, core=r * n)
        case methods.GaSareConfig() | methods.GoSareConfig():
            k = entry_count(settings.density, m, n)
            return _subspace(settings.optimizer, m * n, core=k) + Elements(index=k)
        case methods.LowRankConfig():
            return _adam(r * (m + n))
        case methods.LoroConfig():
            return _adam(r * (m + n)) + Elements(frozen=m * n if pretrained else 0)
        case methods.LoraConfig() | methods.ReloraConfig():
            return _adam(r * (m + n)) + Elements(frozen=m * n)
        case methods.DoraConfig():
            return _adam(r * (m + n) + m) + Elements(frozen=m * n)
        case methods.SLTrainConfig():
            nnz = entry_count(settings.density, m, n)
            return _adam(r * (m + n) + nnz) + Elements(index=nnz)
        case _:
            assert_never(settings)


def _has_heads(settings: methods.GaLorePlusConfig, matrix: Matrix) -> bool:
    by_default = settings.targets == (ALL_LINEAR,) and settings.head_targets == methods.GaLorePlusConfig().head_targets
    return matrix.name in (HEAD_TARGETS if by_default else settings.head_targets)


def _subspace(optimizer: Literal["adamw", "msgd"], frozen: int, core: int) -> Elements:
    return Elements(frozen=frozen, trained=core, core=core, moments=_moments(optimizer) * core)


def _adam(trained: int) -> Elements:
    return Elements(trained=trained, moments=2 * trained)


def _moments(optimizer: Literal["adamw", "msgd"]) -> int:
    return {"adamw": 2, "msgd": 1}[optimizer]


def _rank(settings: methods.RankedSettings, matrix: Matrix) -> int:
    r, smallest = settings.rank, min(matrix.rows, matrix.columns)
    if r is None:
        raise SpecError("method.rank: None has no size; give a rank, or settings whose spec has been resolved")
    if r > smallest:
        raise SpecError(
            f"method.rank: rank {r} is above the smallest side of {matrix.name} ({matrix.rows}×{matrix.columns}); "
            f"choose at most {smallest}, or leave it out of method.targets"
        )
    return r


# ------------------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Parts(_Counts):
    """Bytes. `weights`: trained and frozen; `basis`: bases and places; `buffers`: residuals; `masters`: fp32 copies
    that are stepped, or merged into."""

    weights: int = 0
    basis: int = 0
    buffers: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class Memory:
    """Of one rank."""

    device: Parts
    host: Parts


def memory(
    settings: methods.MethodConfig,
    model: Model,
    *,
    dtype: Literal["fp32", "bf16"],
    zero_stage: Literal[0, 1, 2, 3],
    merge: Literal["nearest", "stochastic", "fp32"] = "nearest",
    offload: Literal["none", "cpu"] = "none",
    offload_parameters: Literal["none", "cpu"] = "none",
    processes: int = 1,
    beside: Others = "trained",
) -> Memory:
    """Bytes of the rank that has most; the settings' names are the spec's, `beside` is its optimisation.others.

    Raises SpecError as `elements`, and for what no run can be.
    """
    if zero_stage == 0 and (dtype == "bf16" or offload == "cpu"):
        raise SpecError(
            f"deepspeed.zero_stage: stage 0 with dtype {dtype} and offload {offload} does not run; "
            "use zero_stage 1, 2 or 3, or dtype fp32 without offload"
        )
    if zero_stage < 3 and offload_parameters != "none":
        raise SpecError(f"deepspeed.offload_parameters: stage {zero_stage} keeps parameters whole; use zero_stage 3")
    if processes < 1:
        raise SpecError(f"resources.processes: {processes} is below 1")
    found = elements(settings, model, beside)

    def share(count: int, first_stage: int) -> int:
        return -(-count // processes) if zero_stage >= first_stage else count

    width = {"fp32": 4, "bf16": 2}[dtype]
    trained = share(found.trained, 2)
    parameters = Parts(
        weights=width * share(found.frozen + found.trained, 3),
        basis=width * share(found.basis, 3) + 4 * share(found.index, 3),
    )
    # No stage shards a buffer, and nothing moves it.
    fixed = Parts(buffers=4 * found.residual, gradients=width * trained if zero_stage < 2 else 0)
    merged = found.frozen if merge == "fp32" else 0
    states = Parts(
        # Added up in fp32; see engine.configuration.
        gradients=4 * trained if zero_stage >= 2 else 0,
        # ZeRO copies trained parameters to a flat fp32 partition even where they are fp32 already.
        masters=4 * (share(found.trained, 1) + share(merged, 1)) if zero_stage >= 1 else 0,
        moments=4 * share(found.moments, 1),
    )
    device, host = fixed, Parts()
    for parts, where in ((parameters, offload_parameters), (states, offload)):
        if where == "none":
            device += parts
        else:
            host += parts
    return Memory(device, host)


# -------------------------------------------------------------------------------------------------- as papers count


@dataclass(frozen=True)
class Convention:
    """Bytes that a published table counts for one element. None counts cores, gradients or masters.

    `others`, `others_moments`: of what trains in full beside the targets.
    """

    frozen: int = 2
    trained: int = 2
    basis: int = 2
    moments: int = 2
    index: int = 8
    others: int = 2
    others_moments: int = 2


@dataclass(frozen=True)
class Published:
    """Bytes of parameters, and of what the optimizer keeps."""

    weights: int
    states: int

    @property
    def total(self) -> int:
        return self.weights + self.states


def published(targets: Elements, others: Elements, convention: Convention) -> Published:
    """From `split`. GaLore+, which no table has, counts its residual as the product holds it."""
    trained = targets.trained - targets.core
    return Published(
        weights=convention.frozen * targets.frozen
        + convention.trained * trained
        + convention.index * targets.index
        + convention.others * others.trained,
        states=convention.basis * targets.basis
        + convention.moments * (targets.moments + targets.residual)
        + convention.others_moments * others.moments,
    )
