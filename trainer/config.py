"""TrainingSpec: everything that defines a run. Imports no torch, touches no file.

Parsing a spec also resolves it: every default that depends on another field is filled in, so that what is stored and
echoed says exactly what is trained. What can only be known by looking at files is checked by `trainer.preflight`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from trainer import defaults
from trainer.combinations import combination_problem, form_of
from trainer.datasetconfig import SOURCES, DatasetSpec, Examples, LabelledDataset
from trainer.guard import GuardSpec
from trainer.methodcheck import problem_of, rank_problem
from trainer.methodconfig import MethodConfig, TargetedSettings
from trainer.modelconfig import DirectoryModel, ModelSpec, PresetModel, starts_from_weights
from trainer.presets import ALL_LINEAR, PRESETS
from trainer.resources import LARGEST_BATCH, Resources
from trainer.resources import problem_of as resources_problem
from trainer.strict import Strict, refuse


def problems(error: ValidationError) -> list[tuple[str, str]]:
    """(field, message) for each line of a pydantic error, with the value that was given."""
    return describe(error.errors(include_url=False))


def describe(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The same, from what `ValidationError.errors()` returns."""
    found = []
    for line in lines:
        if line["type"] == "refused":
            found.append((line["ctx"]["field"], line["msg"]))
            continue
        # A tagged union puts the tag into the location: method.galore.rank is, to the user, method.rank.
        path = [str(part) for part in line["loc"]]
        if len(path) > 1 and path[0] in ("method", "dataset", "model"):
            del path[1]
        given = line.get("input")
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
        found.append((".".join(path), f"{line['msg']}{shown}"))
    return found


# ------------------------------------------------------------------------------------------------------ optimisation


_MOST_STEPS = 2**31 - 1
_ALL = 2**31 - 1
BYTE_VOCABULARY = 257  # one id a byte, and the end of a document


class Optimisation(Strict):
    """How long, how large, how fast. Batches are counted in sequences."""

    steps: int | None = Field(
        default=None, ge=1, le=_MOST_STEPS, description="optimizer steps; give steps, tokens or epochs"
    )
    tokens: int | None = Field(
        default=None, ge=1, le=2**63 - 1, description="steps × tokens of a global batch, rounded up to whole steps"
    )
    epochs: float | None = Field(
        default=None, gt=0, le=10_000, description="times through the examples of a fine-tuning, rounded up to steps"
    )
    global_batch: int = Field(
        default=16, ge=1, le=LARGEST_BATCH, description="sequences, or examples, in one step, over all ranks"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="rows of one rank in one forward pass; default: global_batch / ranks"
    )
    learning_rate: float | None = Field(default=None, gt=0, le=10, description="η at its peak; default: the method's")
    others_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="peak rate of what the method does not replace (embeddings, head, norms, biases); default: η",
    )
    others: Literal["trained", "frozen"] | None = Field(
        default=None,
        description="what the method does not replace; default: trained, but frozen where a low-rank method fine-tunes "
        "pretrained weights. A classifier's head is always trained",
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="linear warm-up; default: a tenth of the steps")
    final_rate_ratio: float = Field(default=0.1, ge=0, le=1, description="cosine decay ends at this share of η")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's β, as in torch")
    epsilon: float = Field(default=1e-8, gt=0, description="Adam's ε")
    weight_decay: float = Field(default=0.0, ge=0, lt=1, description="decoupled; applies to matrices, not to norms")
    clip_norm: float = Field(default=0.0, ge=0, description="largest norm of the trained gradients; 0: no clipping")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of weights and activations")
    merge: Literal["nearest", "stochastic", "fp32"] = Field(
        default="nearest",
        description="bf16: how a change is added to frozen weights at a switch. nearest: rounded; stochastic: rounded "
        "at random, right on average; fp32: to a copy in fp32, sharded from stage 1 on, from which bf16 is rounded",
    )
    form: Literal["auto", "merged", "factored"] = Field(
        default="auto",
        description="where it is what a subspace has learnt. merged: added to the frozen weight after every step, the "
        "quickest; factored: beside it until the next switch, so that bf16 weights are rounded at switches alone. "
        "Default: merged in fp32, factored in bf16 and where parameters are offloaded",
    )
    activation_checkpointing: bool = False
    evaluate_every: int | None = Field(default=None, ge=1, description="steps; default: a tenth of the run")
    evaluation_sequences: int = Field(
        default=128,
        ge=1,
        description="at most this many held-out sequences, or examples; default in task classify: all, written as "
        f"{_ALL}",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights, data order and random bases")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise refuse("optimisation.betas", f"betas {betas} must both lie in [0, 1)")
        return betas


class DeepSpeedSpec(Strict):
    """What DeepSpeed shards and where it keeps it."""

    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="0: nothing sharded … 3: parameters too")
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where the optimizer's state is: on the device, in host memory, in files (stage 3)"
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="where a rank's shard of the parameters waits for its use (stage 3)"
    )
    nvme_path: str | None = Field(default=None, description="a directory on a fast disk of every host, for nvme")
    persistence_threshold: int = Field(
        default=100_000, ge=0, description="stage 3: parameters with fewer elements stay whole on every rank"
    )


class CheckpointSpec(Strict):
    """When the state of a run is written, where to, and what is kept."""

    every: int | None = Field(default=None, ge=1, description="steps; default: a tenth of the run")
    keep: int = Field(default=2, ge=1, description="how many of the newest are kept")
    keep_best: bool = Field(default=True, description="keep the one with the lowest held-out loss beside the newest")
    url: str | None = Field(
        default=None,
        description="a directory for all runs, as fsspec names it: s3://bucket/path, gs://bucket/path; each run has a "
        "folder of its run directory's name in it. Default: inside the run directory",
    )
    asynchronous: bool = Field(default=True, description="write in the background, from a copy in host memory")

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s]+", url):
            raise refuse("checkpoints.url", f"{url!r} is no URL; write it as s3://bucket/path, or leave it out")
        if url is not None and ("::" in url or "@" in url.partition("://")[2].partition("/")[0]):
            # A spec is shown to whoever sees the job; and of chained file systems each would have to be allowed.
            raise refuse("checkpoints.url", "holds credentials or a chain of file systems; give the worker the former")
        return url


# --------------------------------------------------------------------------------------------------------- the whole


class SpecFields(Strict):
    """What may be said of a run. Each part is checked by itself; nothing is filled in that another part decides."""

    task: Literal["pretrain", "finetune", "classify"] = "pretrain"
    model: ModelSpec
    dataset: DatasetSpec
    tokenizer: str = Field(
        default="", description="'bytes', a directory, or a hub id; default: the model's own, bytes for a preset"
    )
    method: MethodConfig
    optimisation: Optimisation
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    guard: GuardSpec = GuardSpec()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        """A preset, a source or a method may be named by a string alone."""
        if not isinstance(data, dict):
            return data
        short = {"model": "preset", "dataset": "source", "method": "name"}
        return {k: {short[k]: v} if k in short and isinstance(v, str) else v for k, v in data.items()}


class TrainingSpec(SpecFields):
    """A run, fully resolved once parsed."""

    @model_validator(mode="after")
    def _resolve(self) -> "TrainingSpec":
        if self.dataset.source not in SOURCES[self.task]:
            allowed = ", ".join(SOURCES[self.task])
            raise refuse("dataset.source", f"task {self.task} takes {allowed}, not {self.dataset.source}; change one")
        preset = self.model.preset if isinstance(self.model, PresetModel) else None
        # A frozen model is not changed once it is made; this is still its making.
        resolved = _resolve_optimisation(self, preset)
        object.__setattr__(self, "optimisation", resolved)
        glue, pretrained = _glue_of(self.dataset), starts_from_weights(self.model)
        method = defaults.with_defaults(self.method, self.task, glue, preset, pretrained, resolved.steps or 0)
        object.__setattr__(self, "method", method)
        every = self.checkpoints.every or max(1, (resolved.steps or 0) // 10)
        object.__setattr__(self, "checkpoints", self.checkpoints.model_copy(update={"every": every}))
        object.__setattr__(self, "tokenizer", self.tokenizer or _tokenizer_of(self.model))
        resolved = resolved.model_copy(update={"form": form_of(self.method, resolved, self.deepspeed)})
        object.__setattr__(self, "optimisation", resolved)
        impossible = combination_problem(self.method, resolved, self.deepspeed)
        if impossible:
            raise refuse(*impossible)
        if isinstance(self.model, PresetModel):
            problem = rank_problem(self.method, PRESETS[self.model.preset], self.model.preset)
            if problem:
                raise refuse("method.rank", problem)
            _check_preset(self.method, self.model, self.tokenizer)
        _check_method(self)
        return self

    def batches_before(self, step: int) -> int:
        """Global batches that the steps before the 0-based `step` read: one each, or ℬ where a large switch was."""
        assert self.optimisation.steps is not None
        size, large = self.method.large_switches(self.optimisation.steps)
        done = len(range(large.start, min(step, large.stop), large.step)) if large else 0
        return step + (size - 1) * done


def _glue_of(dataset: DatasetSpec) -> str | None:
    return dataset.glue if isinstance(dataset, LabelledDataset) else None


def _tokenizer_of(model: ModelSpec) -> str:
    if isinstance(model, PresetModel):
        return "bytes"
    return model.path if isinstance(model, DirectoryModel) else model.hub


def _check_preset(method: MethodConfig, model: PresetModel, tokenizer: str) -> None:
    """What is known of a preset's modules and of the byte tokeniser without making either."""
    linears = [*PRESETS[model.preset].target_sides(), "lm_head"]
    for target in method.targets if isinstance(method, TargetedSettings) else ():
        if target not in (*linears, ALL_LINEAR):
            raise refuse("method.targets", f"{target!r} is no linear module of a preset; it has {', '.join(linears)}")
    if tokenizer == "bytes" and model.vocabulary is not None and model.vocabulary < BYTE_VOCABULARY:
        raise refuse(
            "model.vocabulary", f"{model.vocabulary} rows are too few for bytes, which need {BYTE_VOCABULARY} or more"
        )


def _check_method(spec: "TrainingSpec") -> None:
    method, optimisation = spec.method, spec.optimisation
    assert optimisation.steps is not None
    if method.name == "full" and optimisation.others_learning_rate is not None:
        raise refuse("optimisation.others_learning_rate", "full replaces nothing and has one rate; leave it out")
    if method.name == "full" and optimisation.others == "frozen":
        raise refuse("optimisation.others", "full trains everything, so there are no others to freeze; leave it out")
    if optimisation.others == "frozen" and spec.task != "classify" and optimisation.others_learning_rate is not None:
        raise refuse(
            "optimisation.others_learning_rate",
            f"{optimisation.others_learning_rate:g} is the rate of nothing where the others are frozen; leave it out, "
            "or set optimisation.others to trained",
        )
    problem = problem_of(method, optimisation.steps, starts_from_weights(spec.model), optimisation.weight_decay)
    if problem:
        raise refuse(*problem)


def _resolve_optimisation(spec: TrainingSpec, preset: str | None) -> Optimisation:
    given, ranks, length = spec.optimisation, spec.resources.ranks, spec.dataset.sequence_length

    problem = resources_problem(spec.resources, given.global_batch)
    if problem:
        raise refuse(*problem)
    micro = given.micro_batch or given.global_batch // ranks
    if given.global_batch % (micro * ranks):
        raise refuse(
            "optimisation.micro_batch",
            f"global_batch {given.global_batch} does not divide by micro_batch {micro} × {ranks} ranks",
        )

    pretrained = starts_from_weights(spec.model)
    trains_all = spec.task == "pretrain" or spec.method.name == "full" or not pretrained
    rate = given.learning_rate or defaults.learning_rate(
        spec.method, spec.task, _glue_of(spec.dataset), preset, pretrained
    )
    evaluated = given.evaluation_sequences
    if spec.task == "classify" and "evaluation_sequences" not in given.model_fields_set:
        evaluated = _ALL
    examples = spec.dataset if isinstance(spec.dataset, Examples) else None
    steps = _steps_of_examples(given, examples) if examples else _steps_of_stream(given, length)
    warmup = given.warmup_steps if given.warmup_steps is not None else steps // 10
    if warmup > steps:
        raise refuse("optimisation.warmup_steps", f"warmup_steps {warmup} is above steps {steps}")
    tenth = max(1, steps // 10)
    return given.model_copy(
        update={
            "steps": steps,
            # How many an example has is known only to the trainer.
            "tokens": None if examples else steps * given.global_batch * length,
            "micro_batch": micro,
            "others": given.others or ("trained" if trains_all else "frozen"),
            "learning_rate": rate,
            "warmup_steps": warmup,
            "evaluate_every": given.evaluate_every or tenth,
            "evaluation_sequences": evaluated,
        }
    )


def _steps_of_stream(given: Optimisation, length: int) -> int:
    per_step = given.global_batch * length
    if given.epochs is not None:
        raise refuse("optimisation.epochs", "counts times through examples; give steps or tokens to pre-train")
    if given.steps is None and given.tokens is None:
        raise refuse("optimisation.steps", "give the length of the run: optimisation.steps or optimisation.tokens")
    steps = given.steps if given.steps is not None else math.ceil((given.tokens or 0) / per_step)
    if given.tokens is not None and math.ceil(given.tokens / per_step) != steps:
        raise refuse(
            "optimisation.tokens",
            f"tokens {given.tokens} and steps {steps} disagree: a step has {per_step} tokens; give one of the two",
        )
    if steps > _MOST_STEPS:
        raise refuse(
            "optimisation.tokens", f"tokens {given.tokens} are {steps} steps; at most {_MOST_STEPS} are allowed"
        )
    return steps


def _steps_of_examples(given: Optimisation, dataset: Examples) -> int:
    if given.tokens is not None:
        raise refuse("optimisation.tokens", "examples differ in their tokens; give steps or epochs")
    if given.steps is None and given.epochs is None:
        raise refuse("optimisation.steps", "give the length of the run: optimisation.steps or optimisation.epochs")
    if given.epochs is None:
        assert given.steps is not None
        return given.steps
    if dataset.examples is None:
        raise refuse(
            "dataset.examples",
            "epochs need the number of examples, known only of uploaded files; give it, or steps alone",
        )
    training = dataset.examples - held_out(dataset.examples, dataset.validation_fraction)
    steps = math.ceil(round(training * given.epochs / given.global_batch, 6))
    if given.steps not in (None, steps):
        raise refuse(
            "optimisation.steps",
            f"steps {given.steps} and epochs {given.epochs:g} disagree: {training} examples in batches of "
            f"{given.global_batch} are {steps} steps; give one of the two",
        )
    if steps > _MOST_STEPS:
        raise refuse(
            "optimisation.epochs", f"epochs {given.epochs:g} are {steps} steps; at most {_MOST_STEPS} are allowed"
        )
    return steps


def held_out(examples: int, fraction: float) -> int:
    """How many of the examples, the last ones, are held out: at least one, unless the fraction is 0."""
    return min(examples - 1, max(1, round(examples * fraction))) if fraction > 0 else 0
