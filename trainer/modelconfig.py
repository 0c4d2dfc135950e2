"""Each kind of model's settings, typed. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from trainer.presets import PRESETS
from trainer.strict import Strict, refuse


class PresetModel(Strict):
    """A LLaMA of a named size, initialised from the seed."""

    preset: str = Field(description="one of: " + ", ".join(PRESETS))
    vocabulary: int | None = Field(default=None, ge=2, description="embedding rows; default: the tokeniser's size")

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise refuse("model.preset", f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return name


class DirectoryModel(Strict):
    """A Hugging Face model directory on the trainer's file system."""

    path: str = Field(description="directory with config.json (and weights, unless weights is 'random')")
    weights: Literal["pretrained", "random"] = Field(default="pretrained", description="load weights, or start anew")


class HubModel(Strict):
    """A model of the Hugging Face hub, fetched by the trainer."""

    hub: str = Field(description="repository id, such as meta-llama/Llama-3.2-1B")
    revision: str = "main"
    weights: Literal["pretrained", "random"] = Field(default="pretrained", description="load weights, or start anew")


def _kind_of_model(model: Any) -> str | None:
    """Which key says what the model is. None, and so an error, when not exactly one does."""
    kinds = ("preset", "path", "hub")
    named = [k for k in kinds if (k in model if isinstance(model, dict) else hasattr(model, k))]
    return named[0] if len(named) == 1 else None


ModelSpec = Annotated[
    Annotated[PresetModel, Tag("preset")] | Annotated[DirectoryModel, Tag("path")] | Annotated[HubModel, Tag("hub")],
    Discriminator(
        _kind_of_model,
        custom_error_type="model_kind",
        custom_error_message="a model takes exactly one of preset, path, hub",
    ),
]


def starts_from_weights(model: ModelSpec) -> bool:
    """Whether training starts from weights that somebody has trained."""
    return not isinstance(model, PresetModel) and model.weights == "pretrained"
