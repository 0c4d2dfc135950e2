"""Each kind of dataset's settings, typed. Imports no torch.

Text to pre-train on is one stream of tokens, cut into sequences. Examples to fine-tune on are read one by one, and a
step has so many of them; `trainer.records` reads their files, `trainer.examples` says what a record may be.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer import glue
from trainer.strict import Strict, refuse


class _Stream(Strict):
    sequence_length: int = Field(default=256, ge=2, le=1_048_576, description="tokens in one packed sequence")
    validation_fraction: float = Field(
        default=0.01, ge=0, lt=1, description="share of the token stream, taken from its end, that is held out"
    )


class StdlibDataset(_Stream):
    """The source files of the Python standard library: real text that every machine has."""

    source: Literal["python-stdlib"] = "python-stdlib"


class TextDataset(_Stream):
    """Plain text files, one document a file."""

    source: Literal["text"] = "text"
    files: tuple[str, ...] = Field(min_length=1, description="paths or globs")


class JsonlDataset(_Stream):
    """JSON lines, one document a line."""

    source: Literal["jsonl"] = "jsonl"
    files: tuple[str, ...] = Field(min_length=1, description="paths or globs")
    field: str = Field(default="text", description="the key that holds the text")


class HubDataset(_Stream):
    """A dataset of the Hugging Face hub, or any path that `datasets.load_dataset` takes."""

    source: Literal["hub"] = "hub"
    name: str = Field(description="as in datasets.load_dataset(name, configuration, split=split)")
    configuration: str | None = None
    split: str = "train"
    field: str = Field(default="text", description="the column that holds the text")
    documents: int | None = Field(default=None, ge=1, description="read at most this many documents")


class _Examples(Strict):
    """Files of examples: JSON lines (.jsonl), CSV or TSV with a header, Parquet."""

    files: tuple[str, ...] = Field(min_length=1, description="paths or globs, or ids of uploaded files (file-…)")
    validation_files: tuple[str, ...] = Field(default=(), description="held-out examples, likewise")
    validation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of the examples, the last ones, held out; not with validation_files"
    )
    columns: dict[str, str] = Field(
        default={}, description="what a field is called in the files, where that is not its own name"
    )
    examples: int | None = Field(
        default=None, ge=1, description="in files; optimisation.epochs needs it. Of uploaded files it is known"
    )

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Any:
        if self.validation_files and self.validation_fraction:
            raise refuse(
                "dataset.validation_fraction",
                f"validation_fraction {self.validation_fraction:g} and validation_files both hold examples out; "
                "give one of the two",
            )
        return self


class ExamplesDataset(_Examples):
    """Examples for a causal language model: conversations, prompts with completions, or plain text."""

    source: Literal["examples"] = "examples"
    format: Literal["auto", "chat", "prompt", "text"] = Field(
        default="auto",
        description="chat: messages; prompt: prompt and completion; text: text; auto: by the first example's fields",
    )
    sequence_length: int = Field(default=512, ge=2, le=1_048_576, description="most tokens of an example, and of a row")
    truncation: Literal["end", "start", "drop", "refuse"] = Field(
        default="end",
        description="of an example with more tokens: its end is cut off, or its start; it is left out; or the run is "
        "refused. Left out is also what keeps no token to learn",
    )
    packing: bool = Field(
        default=True, description="several examples in a row, none of which sees another; the loss is the same without"
    )
    train_on: Literal["answers", "all"] = Field(
        default="answers", description="answers: what the assistant says, and completions; all: every token"
    )
    chat_template: str | None = Field(
        default=None, description="Jinja, as transformers has it; default: the tokeniser's, or a plain one without"
    )
    samples: int = Field(
        default=2, ge=0, le=8, description="held-out examples whose answers the model writes at each evaluation"
    )
    sample_tokens: int = Field(default=48, ge=1, le=512, description="most tokens of such an answer")


# By the kind of labels; the first is the default that judges a run.
METRICS = {"classes": ("accuracy", "f1", "matthews"), "number": ("pearson", "spearman")}


class LabelledDataset(_Examples):
    """Sentences, or pairs of them, with a label: for task classify. `trainer.glue` has those of GLUE by name."""

    source: Literal["labelled"] = "labelled"
    glue: str | None = Field(default=None, description="a task of GLUE: sets columns, labels and metric as it has them")
    labels: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="the classes' names, in order; default: those found, sorted"
    )
    kind: Literal["classes", "number"] = Field(default="classes", description="number: regression on one label")
    metric: str | None = Field(
        default=None, description="that a run is judged by: accuracy, f1, matthews; of a regression pearson, spearman"
    )
    sequence_length: int = Field(default=128, ge=2, le=1_048_576, description="most tokens of an example; more are cut")

    @model_validator(mode="after")
    def _resolve(self) -> "LabelledDataset":
        """By the task of GLUE, or by what the labels are: what was not given, and what may not be."""
        task = None
        if self.glue is not None:
            name = glue.name_of(self.glue)
            if name is None:
                raise refuse("dataset.glue", f"unknown task {self.glue!r}; choose one of {', '.join(glue.TASKS)}")
            task = glue.TASKS[name]
            kind = "classes" if task.labels else "number"
            for field, theirs in ("kind", kind), ("labels", task.labels), ("columns", {}):
                own = getattr(self, field)
                if field in self.model_fields_set and own not in (theirs, None):
                    raise refuse(f"dataset.{field}", f"is what GLUE's {name} has, not {own!r}; leave it out, or glue")
            # A frozen dataset is not changed once it is made; this is still its making.
            for field, value in ("glue", name), ("kind", kind), ("labels", task.labels):
                object.__setattr__(self, field, value)
        known = METRICS[self.kind]
        if self.metric is None:
            object.__setattr__(self, "metric", task.metrics[0] if task else known[0])
        if self.metric not in known:
            raise refuse("dataset.metric", f"{self.metric!r} does not judge {self.kind}; choose {', '.join(known)}")
        if self.kind == "number" and self.labels:
            raise refuse("dataset.labels", "a regression has one number and no labels; leave them out")
        if self.labels and len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise refuse("dataset.labels", f"{twice!r} stands there twice; name each class once")
        return self


DatasetSpec = Annotated[
    StdlibDataset | TextDataset | JsonlDataset | HubDataset | ExamplesDataset | LabelledDataset,
    Field(discriminator="source"),
]

Stream = StdlibDataset | TextDataset | JsonlDataset | HubDataset
Examples = ExamplesDataset | LabelledDataset

# Which sources a task takes.
SOURCES = {
    "pretrain": ("python-stdlib", "text", "jsonl", "hub"),
    "finetune": ("examples",),
    "classify": ("labelled",),
}
