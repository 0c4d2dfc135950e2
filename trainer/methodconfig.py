"""Each method's settings, typed. Imports no torch, so that a service can validate a job and publish the schema.

A new method: its class here, a line in `MethodConfig`, its file in `trainer/methods/`, a row in docs/methods.md.
Defaults are the papers'; where a paper gives them by model size, a field is None until the spec resolves it by preset.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainer.presets import ALL_LINEAR, LLAMA_TARGETS, usual_rank
from trainer.strict import refuse


class MethodSettings(BaseModel):
    """What every method has. `paper` and `summary` are what `GET /v1/methods` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    summary: ClassVar[str]
    paper: ClassVar[str]
    default_learning_rate: ClassVar[float]

    def learning_rate(self, preset: str | None) -> float:
        """η where the job names none; the paper's, by preset where it gives one by model size."""
        return self.default_learning_rate

    def resolved(self, preset: str | None) -> Self:
        """With every default filled in that depends on the model's size."""
        return self

    def large_switches(self, steps: int) -> tuple[int, range]:
        """(ℬ, the 0-based steps whose gradient is the mean of ℬ global batches) in a run of `steps`."""
        return 1, range(0)


class FullConfig(MethodSettings):
    """Every weight trained: what the low-rank methods are compared with."""

    summary = "Full-rank training with AdamW (or momentum SGD), the baseline."
    paper = "Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101"
    default_learning_rate = 1e-3

    name: Literal["full"] = "full"
    optimizer: Literal["adamw", "msgd"] = Field(
        default="adamw", description="of the matrices; msgd: M ← β₁M + (1−β₁)G, W ← W − η·M, no bias correction"
    )


# ------------------------------------------------------------------------------------------------- what they share


class TargetedSettings(MethodSettings):
    """What every method has that replaces target matrices."""

    targets: tuple[str, ...] = Field(
        default=LLAMA_TARGETS,
        min_length=1,
        description="last part of the names of the linear modules that are replaced (optimisation.others says what "
        "becomes of all else), or all-linear: every one in the model's repeated blocks. In fine-tuning that is the "
        "default, but for a preset",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _a_word_for_all(cls, given: Any) -> Any:
        return (ALL_LINEAR,) if given == ALL_LINEAR else given

    @field_validator("targets")
    @classmethod
    def _all_or_names(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if ALL_LINEAR in targets and len(targets) > 1:
            others = ", ".join(target for target in targets if target != ALL_LINEAR)
            raise refuse("method.targets", f"{ALL_LINEAR} holds all targets already; leave it out, or {others}")
        return targets

    def has_target(self, name: str) -> bool:
        """Whether a linear module of a LLaMA's blocks, by the last part of its name, is replaced."""
        return name in (LLAMA_TARGETS if self.targets == (ALL_LINEAR,) else self.targets)


class RankedSettings(TargetedSettings):
    rank: int | None = Field(
        default=None,
        ge=1,
        description="r, at most the smallest side of a target; default: the papers' for a preset "
        "(a quarter of the hidden size; 256 for llama-130m), else 128",
    )

    def resolved(self, preset: str | None) -> Self:
        if self.rank is not None:
            return self
        return self.model_copy(update={"rank": usual_rank(preset)})


class SubspaceSettings(TargetedSettings):
    """Frozen weights, an optimizer inside a subspace, a new subspace every `period` steps."""

    period: int = Field(default=200, ge=1, description="τ, steps between two subspaces")
    alpha: float = Field(default=0.25, gt=0, description="α, scale of the update: η·α is the subspace's rate")
    optimizer: Literal["adamw", "msgd"] = Field(
        default="adamw",
        description="inside the subspace; msgd: M ← β₁M + (1−β₁)R, N = M, no bias correction. All else has AdamW",
    )


def entry_count(density: float, rows: int, columns: int) -> int:
    """k = ⌊density·m·n⌋, at least 1: the entries of a sparse part of an m×n matrix."""
    return max(1, int(density * rows * columns))


Moments = Literal["kept", "carried", "reset"]
_MOMENTS = (
    "at a switch; kept: as they are; carried: the first moment is moved through both bases (momentum projection), "
    "the second kept; reset: both 0, and Adam's count"
)
_SWITCH_BATCHES = (
    "ℬ, global batches averaged at a switch: they feed the subspace and that step's update; other steps use one"
)


class GradientSettings(SubspaceSettings):
    """A subspace that is chosen from the gradient."""

    switch_batches: int = Field(default=1, ge=1, le=4096, description=_SWITCH_BATCHES)
    gradients_at_once: Annotated[int, Field(ge=1)] | Literal["block"] = Field(
        default="block",
        description="full gradients that a switch adds up at a time where a step has several micro-batches: so many "
        "matrices', or those of one decoder block. It goes through the micro-batches once for each such group",
    )

    def large_switches(self, steps: int) -> tuple[int, range]:
        return self.switch_batches, range(0, steps, self.period)


class SparseSettings(SubspaceSettings):
    """A subspace of single entries."""

    density: float = Field(default=0.25, gt=0, le=1, description="k / (m·n), share of the entries that are trained")
    alpha: float = Field(default=1.0, gt=0, description="α, scale of the update")


class _SvdSettings(GradientSettings, RankedSettings):
    """A basis of singular vectors of the gradient."""

    svd: Literal["exact", "randomized"] = Field(
        default="exact",
        description="exact: LAPACK or cuSOLVER in float64; randomized: subspace iteration (Halko et al. 2011)",
    )
    oversampling: int = Field(default=8, ge=0, description="extra columns of the randomized sketch")
    power_iterations: int = Field(default=1, ge=0, description="power iterations of the randomized sketch")


# ------------------------------------------------------------------------------------- subspaces from the gradient


class GaLoreConfig(_SvdSettings):
    """Adam on gradients projected to the top singular subspace of the gradient, renewed every `period` steps."""

    summary = "AdamW in the top-r singular subspace of the gradient, renewed every period steps."
    paper = "Zhao et al. 2024, GaLore, arXiv:2403.03507"
    default_learning_rate = 1e-2

    name: Literal["galore"] = "galore"
    moments: Moments = Field(default="kept", description=_MOMENTS)


class GoLoreConfig(_SvdSettings):
    """GaLore first, uniformly random subspaces after: GoLore@x% is random_fraction x/100."""

    summary = "GaLore for the first steps, then uniformly random subspaces, which converge where GaLore stalls."
    paper = "He et al. 2024, Subspace Optimization for Large Language Models with Convergence Guarantees (GoLore), \
arXiv:2410.11289"
    default_learning_rate = 1e-2

    name: Literal["golore"] = "golore"
    random_fraction: float = Field(
        default=0.2, ge=0, le=1, description="last share of the steps, in which a switch samples instead of decomposing"
    )
    moments: Moments = Field(default="carried", description=_MOMENTS)

    def first_random_step(self, steps: int) -> int:
        """0-based; a switch at or after it samples its basis."""
        return steps - math.floor(self.random_fraction * steps + 1e-9)

    def large_switches(self, steps: int) -> tuple[int, range]:
        return self.switch_batches, range(0, self.first_random_step(steps), self.period)


class GaLorePlusConfig(_SvdSettings):
    """GaLore with one basis for all heads of q and k, a fast SVD, and a sparse residual on q and k."""

    summary = "GaLore with cross-head projection on q and k, randomised SVD and a sparsely coded residual."
    paper = "Liao et al. 2024, GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection, \
arXiv:2412.19820"
    default_learning_rate = 1e-2

    name: Literal["galore_plus"] = "galore_plus"
    svd: Literal["exact", "randomized"] = Field(default="randomized", description="as in galore")
    moments: Moments = Field(default="kept", description=_MOMENTS)
    head_targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj"),
        description="targets whose heads share one basis and that have a residual; with targets all-linear by default "
        "those of the model's family",
    )
    residual_density: float = Field(
        default=0.012, ge=0, le=1, description="share of a head target's entries with a residual; 0: no residual"
    )
    residual_warmup: int = Field(default=100, ge=1, description="k, steps before the residual's entries are chosen")
    residual_floor: float = Field(
        default=0.1, ge=0, le=1, description="ρ, least share of the projected second moment in the denominator"
    )


class GaSareConfig(SparseSettings, GradientSettings):
    """Training only the k entries of a matrix that have the largest gradients, renewed every `period` steps."""

    summary = "AdamW on the k entries with the largest gradients of each matrix, renewed every period steps."
    paper = "He et al. 2024 (GoLore), appendix C, algorithm 5, arXiv:2410.11289"
    default_learning_rate = 1e-3

    name: Literal["gasare"] = "gasare"


# ------------------------------------------------------------------------------------------------- random subspaces


class GoSareConfig(SparseSettings):
    """Training k uniformly random entries of a matrix, renewed every `period` steps."""

    summary = "AdamW on k uniformly random entries of each matrix, renewed every period steps."
    paper = "He et al. 2024 (GoLore), appendix C, algorithm 5, arXiv:2410.11289"
    default_learning_rate = 1e-3

    name: Literal["gosare"] = "gosare"


class FloraConfig(SubspaceSettings, RankedSettings):
    """Adam in random Gaussian subspaces that are made from a seed whenever they are needed."""

    summary = "AdamW in Gaussian subspaces regenerated from a seed; the first moment carried at a switch."
    paper = "Hao et al. 2024, Flora: Low-Rank Adapters Are Secretly Gradient Compressors, arXiv:2402.03293"
    default_learning_rate = 1e-2

    name: Literal["flora"] = "flora"
    period: int = Field(default=1000, ge=1, description="κ, steps between two subspaces")
    moments: Moments = Field(default="carried", description=_MOMENTS)


class GaRareConfig(SubspaceSettings, RankedSettings):
    """Adam in random Gaussian subspaces of the rows, never stored: 2rn of state for an m×n weight."""

    summary = "AdamW in Gaussian subspaces of the rows that are regenerated from a seed and never stored."
    paper = "Liu et al. 2025, On the Optimization Landscape of Low Rank Adaptation Methods for Large Language Models \
(GaRare), ICLR 2025"
    default_learning_rate = 1e-2

    name: Literal["garare"] = "garare"
    back_projection: Literal["transpose", "pinv"] = Field(
        default="transpose",
        description="ΔW = P·N, or P(PᵀP)⁻¹·N. Adam cancels the scale of Pᵀ; that of P stays, with α",
    )
    moments: Moments = Field(default="kept", description=_MOMENTS)


# --------------------------------------------------------------------------------------------------- trained factors


class LoroConfig(RankedSettings):
    """Both factors trained by Riemannian steps on the manifold of rank-r matrices: exact ones every `period` steps."""

    summary = "Low-rank Riemannian optimizer: factors only, an exact step every period steps, scaled ones between."
    paper = "Mo, Huang and Pan 2025, Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization \
(LORO), ICLR 2025"
    default_learning_rate = 1e-2
    _by_preset: ClassVar[dict[str, tuple[int, float]]] = {"llama-1b": (200, 5e-3), "llama-7b": (200, 5e-3)}

    name: Literal["loro"] = "loro"
    period: int | None = Field(
        default=None, ge=1, description="K, steps between exact ones; default: 500, and 200 for llama-1b and larger"
    )
    exact_step: Literal["riemannian", "svd", "none"] = Field(
        default="riemannian", description="every K steps; svd: only SVD_r(BA), balanced; the paper's ablations"
    )
    between: Literal["scaled", "unscaled", "preconditioned"] = Field(
        default="scaled",
        description="other steps: rate η·r/d, η, or η with directions times (AAᵀ)⁻¹ and (BᵀB)⁻¹; the paper's ablations",
    )
    refresh: bool = Field(default=True, description="Adam's moments and count of the factors restart after each K")
    restart_warmup: int = Field(default=5, ge=0, description="steps of linear warm-up of η after each exact step")
    scale: float = Field(default=1.0, gt=0, description="λ of W + λBA, where a pretrained W is kept frozen")

    def learning_rate(self, preset: str | None) -> float:
        return self._by_preset[preset][1] if preset in self._by_preset else self.default_learning_rate

    def resolved(self, preset: str | None) -> Self:
        period = self.period or (self._by_preset[preset][0] if preset in self._by_preset else 500)
        return super().resolved(preset).model_copy(update={"period": period})


class LowRankConfig(RankedSettings):
    """W = BA, both trained by AdamW: the naive baseline."""

    summary = "W = BA with both factors trained by AdamW and no full-size weight, the naive baseline."
    paper = "Kamalakara et al. 2022, Exploring Low Rank Training of Deep Neural Networks, arXiv:2209.13569"
    default_learning_rate = 1e-3

    name: Literal["lowrank"] = "lowrank"


class ScaledFactorsSettings(RankedSettings):
    """Factors that enter as (α/r)·BA."""

    alpha: float = Field(default=32.0, gt=0, description="α: the factors enter as (α/r)·BA")


class LoraConfig(ScaledFactorsSettings):
    """W frozen, W + (α/r)BA, both factors trained by AdamW."""

    summary = "Frozen weights plus trained factors, (α/r)·BA."
    paper = "Hu et al. 2022, LoRA, arXiv:2106.09685"
    default_learning_rate = 1e-3

    name: Literal["lora"] = "lora"


class DoraConfig(ScaledFactorsSettings):
    """LoRA on the direction of each row, with its magnitude trained apart."""

    summary = "LoRA on the rows' directions, their magnitudes trained apart."
    paper = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353"
    default_learning_rate = 1e-3

    name: Literal["dora"] = "dora"


class ReloraConfig(ScaledFactorsSettings):
    """LoRA that merges its factors and restarts them every `period` steps."""

    summary = "LoRA merged into the weights and restarted every period steps, with pruned moments and a new warm-up."
    paper = "Lialin et al. 2024, ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv:2307.05695"
    default_learning_rate = 1e-3

    name: Literal["relora"] = "relora"
    period: int = Field(default=1000, ge=1, description="τ, steps between two restarts")
    prune: float = Field(default=0.999, ge=0, le=1, description="share of the factors' moments set to 0 at a restart")
    restart_warmup: int = Field(default=50, ge=0, description="steps of linear warm-up of η after a restart")


class SLTrainConfig(ScaledFactorsSettings):
    """(α/r)BA plus a sparse matrix on a fixed random support, all trained, no full-size weight stored."""

    summary = "Sparse plus low-rank weights, (α/r)·BA + S, S on a fixed random support."
    paper = "Han et al. 2024, SLTrain: a sparse plus low-rank approach, arXiv:2406.02214"
    default_learning_rate = 3e-3

    name: Literal["sltrain"] = "sltrain"
    density: float = Field(default=0.03, gt=0, le=1, description="δ, share of the entries in the sparse part")


MethodConfig = Annotated[
    FullConfig
    | GaLoreConfig
    | GoLoreConfig
    | GaLorePlusConfig
    | GaSareConfig
    | GoSareConfig
    | FloraConfig
    | GaRareConfig
    | LoroConfig
    | LowRankConfig
    | LoraConfig
    | DoraConfig
    | ReloraConfig
    | SLTrainConfig,
    Field(discriminator="name"),
]

METHOD_CONFIGS: dict[str, type[MethodSettings]] = {
    "full": FullConfig,
    "galore": GaLoreConfig,
    "golore": GoLoreConfig,
    "galore_plus": GaLorePlusConfig,
    "gasare": GaSareConfig,
    "gosare": GoSareConfig,
    "flora": FloraConfig,
    "garare": GaRareConfig,
    "loro": LoroConfig,
    "lowrank": LowRankConfig,
    "lora": LoraConfig,
    "dora": DoraConfig,
    "relora": ReloraConfig,
    "sltrain": SLTrainConfig,
}
