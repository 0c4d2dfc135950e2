"""/v1/models: what can be fine-tuned, or asked, by name."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.answers import documented
from api.auth import NotPermitted, Reader, Writer
from api.deps import Given
from jobs import models, wishes
from jobs.errors import ModelNotFound
from jobs.models import TunedModel

router = APIRouter(prefix="/v1/models", tags=["models"], responses=documented(401, 403, 413, 429, 503))


class ModelView(BaseModel):
    object: Literal["model"] = "model"
    id: str
    created: int = Field(description="0 of a model that no job has made")
    owned_by: str


class ModelsView(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


class ModelDeleted(BaseModel):
    object: Literal["model"] = "model"
    id: str
    deleted: Literal[True] = True


@router.get("")
def list_models(given: Given, caller: Reader) -> ModelsView:
    """The operator's, the presets, and the fine-tuned ones of jobs that have succeeded, newest first.

    Checkpoints and repositories of the hub can be named without being listed.
    """
    return ModelsView(data=[_view(model) for model in models.list_models(given.database, given.settings, caller)])


@router.get("/{model:path}", responses=documented(404))
def get_model(given: Given, caller: Reader, model: str) -> ModelView:
    found = models.find(given.database, given.settings, caller, model)
    if not isinstance(found, TunedModel) and not found.listed:
        raise ModelNotFound(model)
    return _view(found)


@router.delete("/{model:path}", responses=documented(404, 409))
def delete_model(given: Given, caller: Writer, model: str) -> ModelDeleted:
    """Remove a fine-tuned model: all checkpoints of its job and what was made of them. The job, its curves and events
    stay; what it wrote to an object store does too."""
    found = models.find(given.database, given.settings, caller, model)
    if not isinstance(found, TunedModel):
        raise NotPermitted(f"{model!r} was not made by a job: whoever runs this service removes it (STIEFEL_MODELS)")
    if found.name != models.name_of(found.job):
        raise NotPermitted(
            f"{model!r} is one of several checkpoints, which checkpoints.keep removes; "
            f"{models.name_of(found.job)!r} is what can be deleted, with all of them"
        )
    wishes.remove_model(given.database, found.job)
    return ModelDeleted(id=model)


def _view(model: models.BaseModel | TunedModel) -> ModelView:
    if isinstance(model, TunedModel):
        created = int(model.job.finished_at or model.job.created_at)
        return ModelView(id=model.name, created=created, owned_by=model.job.owner or "local")
    return ModelView(id=model.name, created=0, owned_by="operator" if model.listed else "hub")
