"""What a request does not say is the papers', by method and task; what it says is never touched."""

from typing import Any

import pytest
from pydantic import ValidationError

from jobs.requests import JobRequest
from trainer import defaults
from trainer.config import TrainingSpec
from trainer.methodconfig import METHOD_CONFIGS
from trainer.presets import LLAMA_TARGETS

# These have no place for pretrained weights.
FROM_RANDOM = ("lowrank", "sltrain")
FINE = [name for name in METHOD_CONFIGS if name not in FROM_RANDOM]


def body(task: str, method: Any, steps: int = 1000, **dataset: Any) -> dict[str, Any]:
    sources = {"pretrain": "python-stdlib", "finetune": "examples", "classify": "labelled"}
    files = {} if task == "pretrain" else {"files": ["/data/train.jsonl"]}
    return {
        "task": task,
        "model": {"path": "/models/roberta-base"},
        "dataset": {"source": sources[task]} | files | dataset,
        "method": method,
        "optimisation": {"steps": steps, "global_batch": 16},
    }


def resolved(task: str, method: Any, **more: Any) -> TrainingSpec:
    return TrainingSpec.model_validate(body(task, method, **more))


def test_galore_on_cola_is_that_of_golore_s_table_4() -> None:
    spec = resolved("classify", "galore", glue="CoLA")
    assert spec.optimisation.learning_rate == 2.5e-5
    assert spec.method.model_dump(include={"rank", "alpha", "period"}) == {"rank": 4, "alpha": 4.0, "period": 500}
    assert resolved("classify", "galore", glue="rte").optimisation.learning_rate == 7e-6
    assert 1e-5 <= (resolved("classify", "galore").optimisation.learning_rate or 0) <= 3e-5


def test_loro_on_glue_has_its_table_s_scale_and_period() -> None:
    spec = resolved("classify", "loro", glue="mrpc")
    assert spec.optimisation.learning_rate == 2e-4
    assert spec.method.model_dump(include={"rank", "scale", "period"}) == {"rank": 4, "scale": 32.0, "period": 100}


def test_galore_plus_on_problems_in_words_is_that_of_its_paper() -> None:
    spec = resolved("finetune", "galore_plus")
    assert spec.optimisation.learning_rate == 1e-6
    assert spec.method.model_dump(include={"rank", "alpha"}) == {"rank": 128, "alpha": 64.0}


@pytest.mark.parametrize(
    ("glue", "rate"),
    [("mnli", 5e-4), ("sst2", 5e-4), ("mrpc", 4e-4), ("cola", 4e-4)]
    + [("qnli", 4e-4), ("qqp", 5e-4), ("rte", 5e-4), ("stsb", 4e-4)],
)
def test_lora_on_glue_is_that_of_its_paper_s_table_9(glue: str, rate: float) -> None:
    spec = resolved("classify", "lora", glue=glue)
    assert spec.optimisation.learning_rate == rate
    assert spec.method.model_dump(include={"rank", "alpha"}) == {"rank": 8, "alpha": 8.0}


def test_dora_on_llama_is_that_of_its_paper_s_table_8() -> None:
    spec = resolved("finetune", "dora")
    assert spec.optimisation.learning_rate == 2e-4
    assert spec.method.model_dump(include={"rank", "alpha"}) == {"rank": 32, "alpha": 64.0}


@pytest.mark.parametrize("task", ["finetune", "classify"])
@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("steps", [10, 499, 100_000])
def test_defaults_fit_every_run_and_are_all_in_the_resolved_spec(task: str, name: str, steps: int) -> None:
    spec = resolved(task, name, steps=steps)
    assert spec == TrainingSpec.model_validate(spec.model_dump())
    assert spec == TrainingSpec.model_validate_json(spec.model_dump_json())
    assert None not in spec.method.model_dump().values()
    assert getattr(spec.method, "targets", ("all-linear",)) == ("all-linear",)
    assert spec.optimisation.others == ("trained" if name == "full" else "frozen")
    assert defaults.ROWS[spec.task][name].source


def test_what_is_given_wins_and_is_refused_where_it_makes_no_sense() -> None:
    given = {"name": "loro", "period": 20, "scale": 2.0, "rank": 3, "targets": ["query", "key"]}
    spec = resolved("classify", given, glue="cola")
    assert spec.method.model_dump(include=set(given)) == given | {"targets": ("query", "key")}
    assert resolved("classify", {"name": "loro", "rank": None}).method.model_dump()["rank"] == 4
    with pytest.raises(ValueError, match="period 2000 is too long for this run"):
        resolved("classify", {"name": "loro", "period": 2000})


def test_pre_training_random_weights_and_presets_keep_theirs() -> None:
    galore = {"rank": 128, "alpha": 0.25, "period": 200, "targets": LLAMA_TARGETS}
    spec = resolved("pretrain", "galore")
    assert spec.method.model_dump(include=set(galore)) == galore
    assert (spec.optimisation.learning_rate, spec.optimisation.others) == (1e-2, "trained")
    preset = TrainingSpec.model_validate(body("finetune", "galore") | {"model": "llama-60m"})
    assert preset.method.model_dump(include=set(galore)) == galore
    assert (preset.optimisation.learning_rate, preset.optimisation.others) == (1e-2, "trained")
    anew = TrainingSpec.model_validate(body("classify", "galore") | {"model": {"path": "/m", "weights": "random"}})
    assert anew.method.model_dump(include=set(galore)) == galore | {"targets": ("all-linear",)}
    assert anew.optimisation.others == "trained"


def test_a_request_is_resolved_as_its_spec_would_be() -> None:
    request = JobRequest.model_validate(body("classify", "galore", glue="sst2") | {"name": "mine"})
    assert request.spec() == resolved("classify", "galore", glue="sst2")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "full", "optimisation": {"steps": 9, "others": "frozen"}}, "optimisation.others"),
        (
            {"method": "lora", "optimisation": {"steps": 9, "others_learning_rate": 1e-3}},
            "optimisation.others_learning_rate",
        ),
        ({"method": {"name": "lora", "targets": ["all-linear", "q_proj"]}}, "method.targets"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError) as refused:
        TrainingSpec.model_validate(body("finetune", "lora") | changes)
    (line,) = refused.value.errors()  # type: ignore[attr-defined]
    assert line["ctx"]["field"] == field


@pytest.mark.parametrize(
    ("dataset", "field"),
    [
        ({"glue": "squad"}, "dataset.glue"),
        ({"glue": "cola", "labels": ["a", "b"]}, "dataset.labels"),
        ({"glue": "stsb", "kind": "classes"}, "dataset.kind"),
        ({"glue": "cola", "metric": "pearson"}, "dataset.metric"),
        ({"metric": "bleu"}, "dataset.metric"),
        ({"kind": "number", "labels": ["a", "b"]}, "dataset.labels"),
        ({"labels": ["a", "a"]}, "dataset.labels"),
    ],
)
def test_a_task_of_glue_is_what_glue_says(dataset: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError) as refused:
        resolved("classify", "lora", **dataset)
    (line,) = refused.value.errors()  # type: ignore[attr-defined]
    assert line["ctx"]["field"] == field


def test_epochs_of_who_knows_how_many_examples_are_refused_also_beside_steps() -> None:
    wanted = body("finetune", "galore")
    wanted["optimisation"]["epochs"] = 3
    with pytest.raises(ValidationError, match="epochs need the number of examples, .* or steps alone"):
        TrainingSpec.model_validate(wanted)
