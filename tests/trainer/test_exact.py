"""Every method in float64 is its paper's, within 1e-10: the product's code against the references on full matrices.

Product: W frozen or factored, autograd, the probe, the switch, `Rules`. Reference (tests/reference): whole gradients,
the papers' equations. A decoder of two layers with grouped-query attention, whose targets have more rows than columns
(gate, up), fewer (k, v, down), and as many (q, o); decay; a warm-up; several switches.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.case import spec as make_spec
from tests.reference.decoder import VOCABULARY, decoder
from tests.reference.product import product_run, reference_run
from trainer.config import TrainingSpec
from trainer.methodconfig import METHOD_CONFIGS, SubspaceSettings

pytestmark = pytest.mark.usefixtures("process_group")

STEPS, ROWS = 10, 4
PERIODIC = {"period": 3}
RANKED = {"rank": 6}
CASES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "full-msgd": {"name": "full", "optimizer": "msgd"},
    "galore": {"name": "galore"},
    "galore-randomized": {"name": "galore", "svd": "randomized", "oversampling": 3},
    "galore-carried": {"name": "galore", "moments": "carried"},
    "galore-reset": {"name": "galore", "moments": "reset"},
    "galore-msgd": {"name": "galore", "optimizer": "msgd"},
    "galore-msgd-carried": {"name": "galore", "optimizer": "msgd", "moments": "carried"},
    "galore-large-batch": {"name": "galore", "switch_batches": 4},
    "golore": {"name": "golore", "random_fraction": 0.5},
    "golore-kept": {"name": "golore", "random_fraction": 1.0, "moments": "kept"},
    "golore-msgd": {"name": "golore", "random_fraction": 0.5, "optimizer": "msgd"},
    "golore-large-batch": {"name": "golore", "random_fraction": 0.5, "switch_batches": 3},
    "gasare": {"name": "gasare", "density": 0.2},
    "gasare-msgd": {"name": "gasare", "density": 0.2, "optimizer": "msgd"},
    "gasare-large-batch": {"name": "gasare", "density": 0.2, "switch_batches": 2},
    "gosare": {"name": "gosare", "density": 0.2, "alpha": 0.5},
    "flora": {"name": "flora"},
    "flora-msgd": {"name": "flora", "optimizer": "msgd"},
    "garare": {"name": "garare"},
    "garare-pinv": {"name": "garare", "back_projection": "pinv"},
    "garare-carried": {"name": "garare", "moments": "carried"},
    "galore_plus": {"name": "galore_plus", "residual_warmup": 4, "residual_density": 0.1},
    "galore_plus-exact": {"name": "galore_plus", "residual_warmup": 2, "residual_density": 0.1, "svd": "exact"},
    "galore_plus-many-heads": {"name": "galore_plus", "rank": 12, "residual_warmup": 2, "residual_density": 0.05},
    "galore_plus-no-residual": {"name": "galore_plus", "residual_density": 0.0},
    "galore_plus-msgd": {"name": "galore_plus", "residual_density": 0.0, "optimizer": "msgd"},
    "loro": {"name": "loro", "restart_warmup": 2},
    "loro-kept": {"name": "loro", "refresh": False, "restart_warmup": 0},
    "loro-every-step": {"name": "loro", "period": 1, "refresh": False, "restart_warmup": 0},
    "loro-unscaled": {"name": "loro", "between": "unscaled", "restart_warmup": 2},
    "loro-preconditioned": {"name": "loro", "between": "preconditioned", "restart_warmup": 2},
    "loro-preconditioned-alone": {"name": "loro", "between": "preconditioned", "exact_step": "none"},
    "loro-svd": {"name": "loro", "exact_step": "svd", "restart_warmup": 2},
    "loro-fine-tuning": {"name": "loro", "scale": 8.0, "targets": ["q_proj", "k_proj"], "restart_warmup": 2},
    "lowrank": {"name": "lowrank"},
    "lora": {"name": "lora"},
    "dora": {"name": "dora"},
    "relora": {"name": "relora", "prune": 0.5, "restart_warmup": 2},
    "sltrain": {"name": "sltrain", "density": 0.1},
}


def settings(case: str) -> dict[str, Any]:
    chosen = CASES[case]
    fields = METHOD_CONFIGS[chosen["name"]].model_fields
    return {key: value for key, value in (PERIODIC | RANKED).items() if key in fields} | chosen


def spec_for(directory: Path, case: str, **optimisation: Any) -> TrainingSpec:
    model = {"preset": "llama-tiny"}
    if case == "loro-fine-tuning":
        model = {"path": "/somebody/has/trained/it"}
        optimisation = {"weight_decay": 0.0} | optimisation
    # Momentum SGD moves by the gradient's size and Adam by the learning rate's.
    rate = 1.0 if settings(case).get("optimizer") == "msgd" else 0.01
    wanted = {"steps": STEPS, "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": rate, "epsilon": 1e-5}
    return make_spec(
        directory,
        model=model,
        tokenizer="bytes",
        method=settings(case),
        optimisation={"global_batch": ROWS} | wanted | optimisation,
        resources={"processes": 1},
    )


def batches_of(spec: TrainingSpec, micro: int = 2) -> list[list[Tensor]]:
    """For each step its micro-batches of so many rows; more of them where a large switch is."""
    generator = torch.Generator().manual_seed(7)
    rows = [
        (spec.batches_before(step + 1) - spec.batches_before(step)) * spec.optimisation.global_batch
        for step in range(STEPS)
    ]
    return [list(torch.randint(VOCABULARY, (count, 12), generator=generator).split(micro)) for count in rows]


# Merged layers change their subspaces in the backward pass of a step that has one micro-batch alone.
FORMS = [("merged", 2), ("merged", ROWS), ("factored", 2)]
FORMS_OF = [
    (case, form, micro)
    for case in CASES
    for form, micro in (FORMS if issubclass(METHOD_CONFIGS[CASES[case]["name"]], SubspaceSettings) else [("auto", 2)])
]


@pytest.mark.parametrize(("case", "form", "micro"), FORMS_OF)
def test_a_method_is_its_papers_in_float64(tmp_path: Path, case: str, form: str, micro: int) -> None:
    spec, model = spec_for(tmp_path, case, form=form), decoder()
    batches = batches_of(spec, micro)
    expected, expected_losses = reference_run(spec, model, [torch.cat(micro) for micro in batches])
    got, losses, _, _ = product_run(spec, model, batches)
    assert losses == pytest.approx(expected_losses, abs=1e-10)
    assert got.keys() == expected.keys()
    deviation = {name: float((got[name] - expected[name]).abs().max()) for name in expected}
    worst = max(deviation, key=deviation.__getitem__)
    assert deviation[worst] < 1e-10, f"{worst} deviates by {deviation[worst]:.2e}"
    moved = {name: float((expected[name] - p.detach()).abs().max()) for name, p in model.named_parameters()}
    assert min(moved.values()) > 1e-3, "the reference moves too little to tell"
