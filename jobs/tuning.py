"""A request of /v1/fine_tuning/jobs in our own terms: what it asks for, resolved, and what it shows of that.

What is wrong is told by the name that the user wrote.
"""

import math
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Text, cast, null

from jobs import access, inputs, models
from jobs.database import Database
from jobs.errors import Forbidden, ModelNotFound, NotChecked, Refused
from jobs.inputs import Inputs
from jobs.keys import Caller
from jobs.models import TunedModel
from jobs.requests import FILE_ID, JobRequest
from jobs.settings import Settings
from jobs.tables import Job, StoredFile
from jobs.tuningbody import Wish
from trainer.config import held_out, problems
from trainer.errors import DataError, SpecError
from trainer.preflight import preflight

DEFAULT_METHOD = "galore"
DEFAULT_EPOCHS = 3
# "auto": a hundredth of the examples in a batch, within these.
_SMALLEST_BATCH, _LARGEST_BATCH, _BATCHES = 8, 32, 100

_TASKS = {"supervised": "finetune", "classify": "classify", "pretrain": "pretrain"}
_SOURCES = {"supervised": ("examples",), "classify": ("labelled",), "pretrain": ("jsonl", "text")}
# Where a field of ours stands here, if the user did not write it.
_ELSEWHERE = {
    ("model",): "model",
    ("name",): "suffix",
    ("method",): "optimizer",
    ("dataset", "files"): "training_file",
    ("dataset", "examples"): "training_file",
    ("dataset", "validation_files"): "validation_file",
}
_FIELD = re.compile(r"\b(?:model|method|dataset|optimisation)(?:\.[a-z_]+)+")


@dataclass(frozen=True)
class Asked:
    """`shown` is what Job.tuning holds."""

    request: JobRequest
    inputs: Inputs
    shown: dict[str, Any]
    names: "Names"


class Names:
    """What our fields are called in the user's request."""

    def __init__(self, wish: Wish) -> None:
        self._names = _ELSEWHERE | {
            ("optimisation", "epochs"): wish.name_of("n_epochs"),
            ("optimisation", "global_batch"): wish.name_of("batch_size"),
            ("optimisation", "learning_rate"): wish.name_of("learning_rate_multiplier"),
        }
        if wish.body.seed is not None:
            self._names[("optimisation", "seed")] = "seed"
        for path, name in wish.written.items():
            ours = ("method", *path[1:]) if path[0] == "optimizer" else path
            self._names[ours] = name

    def of(self, field: str) -> str:
        parts = tuple(field.split("."))
        for length in range(len(parts), 0, -1):
            if (name := self._names.get(parts[:length])) is not None:
                # A model has one name here, whatever kind it is.
                rest = () if name in ("model", "training_file", "validation_file") else parts[length:]
                return ".".join((name, *rest))
        return field

    def within(self, text: str) -> str:
        return _FIELD.sub(lambda match: self.of(match[0]), text)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever is refused inside is refused by the user's names."""
        try:
            yield
        except ValidationError as error:
            (field, reason), *others = problems(error)
            more = [f"{self.of(name)}: {text}" for name, text in others]
            raise Refused(self.of(field), self.within("; ".join([reason, *more]))) from error
        except (SpecError, DataError) as error:
            field, _, reason = str(error).partition(": ")
            raise Refused(self.of(field), self.within(reason)) from error
        except Refused as error:
            raise Refused(self.of(error.field), self.within(error.reason), error.code) from error
        except NotChecked as error:
            raise NotChecked(self.of(error.field), error.file_id) from error
        except Forbidden as error:
            raise Forbidden(self.of(error.field), self.within(error.reason)) from error


def asked(database: Database, settings: Settings, caller: Caller, given: dict[str, Any]) -> Asked:
    """A body, looked at and resolved as POST /v1/jobs does it. Raises Refused, Forbidden, NotChecked."""
    wish = Wish(given)
    names = Names(wish)
    training = _file(database, caller, "training_file", wish.body.training_file)
    validation = wish.body.validation_file
    if validation is not None:
        _file(database, caller, "validation_file", validation)
    try:
        model = models.find(database, settings, caller, wish.body.model)
    except ModelNotFound as error:
        raise Refused("model", str(error), "model_not_found") from error
    granted = () if isinstance(model, TunedModel) else model.granted
    seed = _seed(wish)
    with names.told():
        body = _body(wish, model, training, seed)
        # The parts by themselves: what the batch must divide by is among them.
        parts = JobRequest.model_validate(body)
        examples = _training_examples(training, parts)
        batch = wish.batch_size or parts.resources.ranks * (parts.optimisation.micro_batch or 1)
        if wish.batch_size is None:
            batch = automatic_batch(examples, batch)
        optimisation = _optimisation(wish, seed, batch)
        rate = optimisation.pop("learning_rate", None)
        request = JobRequest.model_validate(body | {"optimisation": optimisation})
        found = inputs.resolve(database, settings, caller, request, granted, patience=0.0)
        usual = found.spec.optimisation.learning_rate
        assert usual is not None
        if wish.learning_rate_multiplier is not None:
            rate = wish.learning_rate_multiplier * usual
        if rate is not None:
            request = JobRequest.model_validate(body | {"optimisation": optimisation | {"learning_rate": rate}})
            found = inputs.resolve(database, settings, caller, request, granted, patience=0.0)
        access.refuse(settings, found.spec, found.granted)
        if settings.check_files:
            preflight(found.spec, found.granted)
    resolved = found.spec.optimisation
    assert resolved.learning_rate is not None and resolved.steps is not None
    epochs = resolved.epochs or resolved.steps * resolved.global_batch / (examples or 1)
    shown = {
        "model": wish.body.model,
        "base": models.base_name(model),
        "suffix": wish.body.suffix,
        "training_file": training.id,
        "validation_file": validation,
        "seed": seed,
        "type": wish.type,
        "hyperparameters": {
            "n_epochs": None if wish.type == "pretrain" else max(1, math.ceil(round(epochs, 6))),
            "batch_size": resolved.global_batch,
            "learning_rate_multiplier": float(f"{resolved.learning_rate / usual:.6g}"),
        },
        "granted": list(granted),
        "result_files": [],
    }
    return Asked(request, found, shown, names)


def automatic_batch(examples: int | None, divisor: int) -> int:
    """The largest power of two up to a hundredth of the examples, 8 at least and 32 at most, and no more than there are
    examples; rounded up to a multiple of `divisor`."""
    wanted = _SMALLEST_BATCH
    if examples is not None:
        share = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, examples // _BATCHES))
        wanted = 2 ** int(math.log2(max(1, min(share, examples))))
    return -(-wanted // divisor) * divisor


def _file(database: Database, caller: Caller, field: str, file_id: str) -> StoredFile:
    if not FILE_ID.fullmatch(file_id):
        raise Refused(field, f"{file_id!r} is no id of a file; upload one with POST /v1/files", "invalid_file")
    return inputs.stored(database, caller, field, file_id, inputs.PATIENCE_SECONDS)


def _body(wish: Wish, model: models.BaseModel | TunedModel, training: StoredFile, seed: int) -> dict[str, Any]:
    """As POST /v1/jobs takes it, without what is worked out afterwards."""
    kept = {name: wish.said[name] for name in ("tokenizer", "priority") if name in wish.said}
    groups = ("deepspeed", "resources", "checkpoints", "guard", "retry")
    optimisation = wish.settings("optimisation")
    return kept | {
        "task": _TASKS[wish.type],
        "name": wish.body.suffix,
        "metadata": wish.body.metadata or {},
        "model": {"hub": model.name} if isinstance(model, TunedModel) else model.spec.model_dump(),
        "method": {"name": DEFAULT_METHOD} | wish.settings("optimizer"),
        "dataset": _dataset(wish, training),
        "optimisation": optimisation | {"seed": seed},
        **{name: wish.settings(name) for name in groups if name in wish.said},
    }


def _dataset(wish: Wish, training: StoredFile) -> dict[str, Any]:
    given = wish.settings("dataset")
    for name, instead in (("files", "training_file"), ("validation_files", "validation_file"), ("examples", None)):
        if name in given:
            said = f"{instead} says it" if instead else "it is known of uploaded files"
            raise Refused(f"dataset.{name}", f"{said}; leave this out")
    sources = _SOURCES[wish.type]
    source = given.setdefault("source", sources[0])
    if source not in sources:
        raise Refused("dataset.source", f"{source!r}, but a method of type {wish.type} takes {' or '.join(sources)}")
    given["files"] = [training.id]
    if wish.type == "pretrain":
        if wish.body.validation_file is not None:
            raise Refused("dataset.validation_files", "pretrain holds out dataset.validation_fraction; leave this out")
        return given
    return given | ({"validation_files": [wish.body.validation_file]} if wish.body.validation_file else {})


def _seed(wish: Wish) -> int:
    inside = wish.settings("optimisation").get("seed")
    name = wish.written.get(("optimisation", "seed"), "")
    if inside is None:
        return secrets.randbelow(2**31) if wish.body.seed is None else wish.body.seed
    if isinstance(inside, bool) or not isinstance(inside, int) or not 0 <= inside < 2**31:
        raise Refused(name, f"must be a whole number from 0 to {2**31 - 1} (got {inside!r})")
    if wish.body.seed not in (None, inside):
        raise Refused(name, f"{inside}, but seed says {wish.body.seed}; say it once")
    return inside


def _training_examples(training: StoredFile, parts: JobRequest) -> int | None:
    if training.examples is None:
        return None
    return training.examples - held_out(training.examples, parts.dataset.validation_fraction)


def _optimisation(wish: Wish, seed: int, batch: int) -> dict[str, Any]:
    given = wish.settings("optimisation") | {"seed": seed}
    for name, value, hyperparameter in (
        ("epochs", wish.n_epochs, "n_epochs"),
        ("global_batch", wish.batch_size, "batch_size"),
        ("learning_rate", wish.learning_rate_multiplier, "learning_rate_multiplier"),
    ):
        if value is not None and given.get(name) is not None and (name == "learning_rate" or given[name] != value):
            written = wish.written[("optimisation", name)]
            raise Refused(written, f"{given[name]!r}, but {wish.name_of(hyperparameter)} says {value!r}; say it once")
    given.setdefault("global_batch", batch)
    if wish.type == "pretrain":
        if wish.n_epochs is not None:
            raise Refused(wish.name_of("n_epochs"), "pretrain counts steps or tokens; give optimisation.steps")
        return given
    if wish.n_epochs is not None:
        given["epochs"] = wish.n_epochs
    elif given.get("epochs") is None and given.get("steps") is None:
        given["epochs"] = DEFAULT_EPOCHS
    return given


def chosen(query: Mapping[str, str]) -> list[ColumnElement[bool]]:
    """Which jobs a list has: those of this protocol, and of them those whose metadata[KEY] is VALUE, or that have none
    (metadata=null). Raises Refused."""
    pairs = {key[len("metadata[") : -1]: value for key, value in query.items() if re.fullmatch(r"metadata\[.+\]", key)}
    found: list[ColumnElement[bool]] = [Job.tuning.is_not(null())]
    if "metadata" in query:
        if query["metadata"] != "null" or pairs:
            raise Refused("metadata", "filter by metadata[KEY]=VALUE, or by metadata=null alone")
        return [*found, cast(Job.user_metadata, Text) == "{}"]
    for key, value in pairs.items():
        if '"' in key or "\\" in key or "\x00" in key + value:
            raise Refused(
                "metadata", f"{key!r}: a key with a quotation mark, a backslash or U+0000 cannot be asked for"
            )
        found.append(Job.user_metadata[key].as_string() == value)
    return found
