"""The body of POST /v1/fine_tuning/jobs: OpenAI's, and beside it or inside its hyperparameters the settings of ours.

Whatever is said in two places is said alike, or it is refused; whatever nobody knows is refused too.
"""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from jobs.errors import Refused
from jobs.requests import unstorable
from trainer.config import describe
from trainer.strict import Strict

TYPES = ("supervised", "pretrain", "classify")
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
# What a job of ours takes, by the names that it has here: extra_body brings them.
# Far beyond what any of them can mean; what they can, is checked where they are used.
_MOST = 2**31
GROUPS = ("optimizer", "optimisation", "dataset", "deepspeed", "resources", "checkpoints", "guard", "retry")
SETTINGS = (*GROUPS, "tokenizer", "priority")


class TuningBody(Strict):
    """What OpenAI's client sends, and, through its extra_body, what a low-rank method and our trainer want to know."""

    model: str = Field(
        min_length=1,
        max_length=512,
        description="a name of GET /v1/models, a fine-tuned model or checkpoint (ft:…), a hub id, or a directory",
    )
    training_file: str = Field(description="id of an uploaded file (POST /v1/files)")
    validation_file: str | None = Field(default=None, description="likewise; held out")
    seed: int | None = Field(default=None, ge=0, lt=2**31, description="default: drawn, and told")
    suffix: str | None = Field(
        default=None, min_length=1, max_length=64, description="becomes part of the model's name"
    )
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(min_length=1, max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        default=None, description="none are there: null or []"
    )
    method: dict[str, Any] | None = Field(
        default=None,
        description='{"type": TYPE, TYPE: {"hyperparameters": {…}}}, where TYPE is supervised, or our pretrain or '
        "classify. Among the hyperparameters all that may stand beside the method may stand too",
    )
    hyperparameters: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"deprecated": True}, description="as inside the method"
    )
    optimizer: dict[str, Any] | str | None = Field(
        default=None, description="the low-rank method: `method` of POST /v1/jobs. Default: galore"
    )
    optimisation: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    dataset: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs, without files")
    tokenizer: str | None = Field(default=None, description="as in POST /v1/jobs")
    deepspeed: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    resources: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    checkpoints: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    guard: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    retry: dict[str, Any] | None = Field(default=None, description="as in POST /v1/jobs")
    priority: int | None = Field(default=None, description="as in POST /v1/jobs")


class Wish:
    """What a body says, each thing once: OpenAI's fields in `body`, hyperparameters and settings in `said`.

    `written` has for each path into `said` the name under which the user wrote it.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.body = _parsed(given)
        self.type, inside = _method(self.body.method)
        self.said: dict[str, Any] = {}
        self.written: dict[tuple[str, ...], str] = {}
        beside = {name: getattr(self.body, name) for name in SETTINGS}
        self._take("", {name: value for name, value in beside.items() if value is not None})
        self._take("hyperparameters.", self.body.hyperparameters or {})
        self._take(f"method.{self.type}.hyperparameters.", inside)
        self.n_epochs = self._whole("n_epochs")
        self.batch_size = self._whole("batch_size")
        self.learning_rate_multiplier = self._number("learning_rate_multiplier")

    def name_of(self, hyperparameter: str) -> str:
        """As it was written; as one would write it, where it was not."""
        return self.written.get((hyperparameter,), f"method.{self.type}.hyperparameters.{hyperparameter}")

    def settings(self, name: str) -> dict[str, Any]:
        """A group of settings, empty where it was not given."""
        given = self.said.get(name, {})
        return dict(given) if isinstance(given, dict) else given

    def _take(self, place: str, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name not in HYPERPARAMETERS and name not in SETTINGS:
                known = ", ".join((*HYPERPARAMETERS, *SETTINGS))
                raise Refused(place + name, f"unknown; hyperparameters are {known}", "unknown_parameter")
            if name == "optimizer" and isinstance(value, str):
                value = {"name": value}
            elif name in GROUPS and value is not None and not isinstance(value, dict):
                raise Refused(place + name, f"must be an object (got {value!r})")
            if value is not None:
                _merge(self.said, self.written, (name,), value, place + name)

    def _whole(self, name: str) -> int | None:
        value = self.said.get(name, "auto")
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _MOST:
            raise Refused(self.name_of(name), f"must be a whole number from 1 on, or 'auto' (got {value!r})")
        return value

    def _number(self, name: str) -> float | None:
        value = self.said.get(name, "auto")
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
            raise Refused(self.name_of(name), f"must be a number above 0, or 'auto' (got {value!r})")
        return float(value)


def _parsed(given: dict[str, Any]) -> TuningBody:
    if problem := unstorable(given):
        raise Refused(*problem)
    try:
        return TuningBody.model_validate(given)
    except ValidationError as error:
        lines = list(error.errors(include_url=False))
        found = [(_field(line["loc"]), describe([line])[0][1]) for line in lines]
        field, reason = found[0]
        if field == "integrations":
            reason = "no integrations are there; leave it out"
        elif lines[0]["type"] == "extra_forbidden":
            reason = f"unknown; beside OpenAI's own there are {', '.join(SETTINGS)}"
            raise Refused(field, reason, "unknown_parameter") from error
        raise Refused(field, "; ".join([reason, *(f"{name}: {text}" for name, text in found[1:])])) from error


def _field(place: tuple[int | str, ...]) -> str:
    # What a group holds is looked at later: here it can only be of a wrong kind, of which there may be several.
    return str(place[0]) if place[0] in GROUPS else ".".join(str(part) for part in place)


def _method(method: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """(its type, its hyperparameters)"""
    if method is None:
        return "supervised", {}
    kind = method.get("type")
    if kind in ("dpo", "reinforcement"):
        raise Refused("method.type", f"{kind} is not done here; choose one of {', '.join(TYPES)}", "unsupported_method")
    if kind not in TYPES:
        raise Refused("method.type", f"choose one of {', '.join(TYPES)} (got {kind!r})")
    for name, value in method.items():
        if name not in ("type", kind) and value is not None:
            raise Refused(f"method.{name}", f"the method's type is {kind}; say {name!r} there, or leave this out")
    of_kind = method.get(kind)
    if of_kind is None:
        return kind, {}
    if not isinstance(of_kind, dict):
        raise Refused(f"method.{kind}", f"must be an object (got {of_kind!r})")
    for name in of_kind:
        if name != "hyperparameters":
            raise Refused(f"method.{kind}.{name}", "unknown; there is hyperparameters", "unknown_parameter")
    hyperparameters = of_kind.get("hyperparameters")
    if hyperparameters is not None and not isinstance(hyperparameters, dict):
        raise Refused(f"method.{kind}.hyperparameters", f"must be an object (got {hyperparameters!r})")
    return kind, hyperparameters or {}


def _merge(
    said: dict[str, Any], written: dict[tuple[str, ...], str], path: tuple[str, ...], value: Any, name: str
) -> None:
    *_, key = path
    if isinstance(value, dict):
        inner = said.setdefault(key, {})
        if not isinstance(inner, dict):
            raise Refused(name, f"{value!r}, but {written[path]} says {inner!r}; say it once")
        written.setdefault(path, name)
        for one, what in value.items():
            _merge(inner, written, (*path, str(one)), what, f"{name}.{one}")
    elif key in said and (said[key] != value or isinstance(said[key], bool) != isinstance(value, bool)):
        raise Refused(name, f"{value!r}, but {written[path]} says {said[key]!r}; say it once")
    else:
        said[key] = value
        written.setdefault(path, name)
