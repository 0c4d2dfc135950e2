"""Each method's settings, typed. Imports no torch, so that a service can validate a job and publish the schema.

A new method: its class here, a line in `MethodConfig`, its file in `trainer/methods/`, a row in docs/methods.md.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.presets import LLAMA_TARGETS


class MethodSettings(BaseModel):
    """What every method has. `paper` and `summary` are what `GET /v1/methods` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    summary: ClassVar[str]
    paper: ClassVar[str]
    default_learning_rate: ClassVar[float]


class LowRankSettings(MethodSettings):
    """What every method has that replaces target matrices."""

    rank: int = Field(default=128, ge=1, description="r, columns of the basis; at most the smallest side of a target")
    targets: tuple[str, ...] = Field(
        default=LLAMA_TARGETS,
        min_length=1,
        description="last part of the names of the linear modules that are projected; all others train in full",
    )


class FullConfig(MethodSettings):
    """Every weight trained by AdamW: what the low-rank methods are compared with."""

    summary = "Full-rank training with AdamW, the baseline."
    paper = "Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101"
    default_learning_rate = 1e-3

    name: Literal["full"] = "full"


class GaLoreConfig(LowRankSettings):
    """Adam on gradients projected to the top singular subspace of the gradient, renewed every `period` steps."""

    summary = "AdamW in the top-r singular subspace of the gradient, renewed every period steps."
    paper = "Zhao et al. 2024, GaLore, arXiv:2403.03507"
    default_learning_rate = 1e-2

    name: Literal["galore"] = "galore"
    period: int = Field(default=200, ge=1, description="τ, steps between two subspaces")
    alpha: float = Field(default=0.25, gt=0, description="α, scale of the low-rank update: η·α is the core's rate")
    svd: Literal["exact", "randomized"] = Field(
        default="exact",
        description="exact: LAPACK or cuSOLVER in float64; randomized: subspace iteration (Halko et al. 2011)",
    )
    oversampling: int = Field(default=8, ge=0, description="extra columns of the randomized sketch")
    power_iterations: int = Field(default=2, ge=0, description="power iterations of the randomized sketch")


MethodConfig = Annotated[FullConfig | GaLoreConfig, Field(discriminator="name")]

METHOD_CONFIGS: dict[str, type[MethodSettings]] = {"full": FullConfig, "galore": GaLoreConfig}
