"""What a user submits: a training specification and a name to find it again."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from jobs.failures import RETRIED_BY_DEFAULT, FailureClass
from trainer.config import SpecFields, TrainingSpec
from trainer.datasetconfig import Examples, JsonlDataset, TextDataset
from trainer.modelconfig import DirectoryModel
from trainer.strict import refuse

# What stands for an uploaded file where a path may stand.
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_HALF = re.compile("[\ud800-\udfff]")
# Of a request, what is not the trainer's.
_OURS = {"name", "metadata", "priority", "retry"}


def unstorable(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field, what is wrong) of the first that holds a character which no database keeps and no answer can show."""
    for field, value in body.items():
        text = json.dumps({field: value}, default=str, ensure_ascii=False)
        name = field.encode(errors="backslashreplace").decode()
        if "\\u0000" in text:
            return name, "holds the character U+0000, which cannot be stored"
        if _HALF.search(text):
            return name, "holds half of a surrogate pair, which is no character"
    return None


class RetryPolicy(BaseModel):
    """What becomes of an attempt that failed. A worker that shuts down or a preemption spends no attempt."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_attempts: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="failures in a row, without a new checkpoint in between, that end it; default: the installation's",
    )
    on: tuple[FailureClass, ...] = Field(
        default=RETRIED_BY_DEFAULT, description="classes of failure after which the job is tried again"
    )
    backoff_seconds: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="before the second attempt; doubles with each, up to an hour; default: the installation's",
    )


class JobRequest(SpecFields):
    """The body of POST /v1/jobs. Paths are the trainer's, and absolute: nobody shares a working directory.

    A dataset's files may be ids of uploaded ones, and model.hub the name of a fine-tuned model: `jobs.inputs` knows
    where those are.
    """

    name: str | None = Field(default=None, min_length=1, max_length=64, description="shown in lists")
    metadata: dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field(default={}, max_length=16, description="up to 16 pairs of your own")
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="higher first; of equal ones whose owner has fewest running, then oldest",
    )
    retry: RetryPolicy = RetryPolicy()

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, data: Any) -> Any:
        if isinstance(data, dict) and (found := unstorable(data)):
            raise refuse(*found)
        return data

    @model_validator(mode="after")
    def _absolute_paths(self) -> "JobRequest":
        paths: list[tuple[str, str]] = []
        if isinstance(self.dataset, TextDataset | JsonlDataset | Examples):
            paths += [("dataset.files", file) for file in self.dataset.files]
        if isinstance(self.dataset, Examples):
            paths += [("dataset.validation_files", file) for file in self.dataset.validation_files]
        if isinstance(self.model, DirectoryModel):
            paths.append(("model.path", self.model.path))
        if self.tokenizer.startswith(".") and not isinstance(self.model, DirectoryModel):
            paths.append(("tokenizer", self.tokenizer))
        for field, path in paths:
            if not Path(path).is_absolute() and not (field.startswith("dataset.") and FILE_ID.fullmatch(path)):
                raise refuse(field, f"{path!r} is relative; give an absolute path, as the trainer sees it")
        return self

    @model_validator(mode="after")
    def _one_host(self) -> "JobRequest":
        if self.resources.hosts > 1:
            raise refuse(
                "resources.hosts",
                f"{self.resources.hosts} hosts, but a worker trains on its own host alone; use 1 here, or start the "
                "trainer on every host as docs/multi-node.md says",
            )
        return self

    def spec(self) -> TrainingSpec:
        """Resolved. Raises pydantic.ValidationError where its parts do not go together.

        What was not said stays unsaid on the way: a default may depend on another part.
        """
        return TrainingSpec.model_validate(self.model_dump(exclude=_OURS, exclude_unset=True))
