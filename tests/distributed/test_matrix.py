"""Every method under every ZeRO stage, offloaded, in fp32 and bf16, on one to three ranks, is its paper's.

In fp32: effective weights within 1e-5 of a reference that works on whole gradients in one process (tests/reference). In
bf16: the weights have moved as the fp32 reference's have, within a share of the way (see BF16), and so have the losses.

`make test` trains a selection in which every two values of different axes meet, `make test-matrix` all of them; it also
writes what it measures into docs/zero.md.
"""

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import astuple
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import load_arrays, read_json
from tests.distributed.group import run_group
from tests.distributed.matrix import STEPS, Case, every_case, thinned
from tests.distributed.refusals import refusals
from tests.distributed.report import PAGE
from tests.reference.product import reference_run
from trainer.config import TrainingSpec
from trainer.data import Sequences
from trainer.model import DTYPES, build_model
from trainer.prepare import prepare
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer

# Largest entry of the difference.
FP32 = 1e-5
# In bf16, of each matrix ‖W − W_ref‖ ≤ BF16·‖W_ref − W_start‖ + ROUNDING·‖W_ref‖. A forward and a backward pass in
# bf16 have gradients that are off by a few 2⁻⁸, and Adam's first steps, which are near to signs, turn round where a
# gradient is smaller than that. A share q of entries that turn is 2√q of the way: the half is one entry in sixteen.
# Each merge rounds the frozen weights, unless there is a copy in fp32: by half a unit in the last place, 2⁻⁹ of an
# entry, at random by a whole one.
BF16 = 0.5
MERGES = 2
ROUNDING = {
    "bf16": MERGES * 2**-9,
    "bf16, merged": STEPS * 2**-9,
    "bf16, stochastic": MERGES * 2**-8,
    "bf16, fp32 copy": 0.0,
}
LOSS = {"fp32": 1e-5, "bf16": 0.01}
# Cases of one group of ranks: should one hang, not all are lost.
TOGETHER = 120

# Made when tests are collected, for what is refused is found by making specs; nothing of it outlives the session.
DIRECTORY = Path(tempfile.mkdtemp(prefix="stiefel-matrix-"))
atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)
CASES, REFUSED = every_case(DIRECTORY)
FEW = set(thinned(CASES))


# Lists of cases that one group of ranks trains, one after the other.
GROUPS: list[list[Case]] = []
for ranks, few in product((1, 2, 3), (True, False)):
    same = [case for case in CASES if case.ranks == ranks and (case in FEW) == few]
    GROUPS += [same[first : first + TOGETHER] for first in range(0, len(same), TOGETHER)]
GROUP_OF = {case: number for number, group in enumerate(GROUPS) for case in group}


def parameters() -> list[Any]:
    return [pytest.param(c, id=str(c), marks=[] if c in FEW else [pytest.mark.matrix]) for c in CASES]


@pytest.fixture(scope="session")
def selected(request: pytest.FixtureRequest) -> set[Case]:
    params = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    return {case for case in params if isinstance(case, Case)}


def directory_of(case: Case) -> Path:
    return DIRECTORY / str(case).replace(" ", "_").replace(",", "")


@pytest.fixture
def trained(selected: set[Case], case: Case) -> Path:
    if not (directory_of(case) / "answer.json").exists():
        wanted = [
            {"directory": str(directory_of(c)), "spec": c.spec(DIRECTORY).model_dump(mode="json"), "steps": STEPS}
            for c in GROUPS[GROUP_OF[case]]
            if c in selected
        ]
        run_group(DIRECTORY, case.ranks, wanted, timeout=60 + 10 * len(wanted))
    return directory_of(case)


@cache
def reference(method: str, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """(weights at the start, at the end, losses), in fp32 from the start that `dtype` has."""
    spec = Case(method, "1" if dtype == "bf16" else "0", dtype, 1, 1, False)
    if method == "galore, large batch" and dtype == "bf16":
        spec = Case(method, "2", dtype, 1, 1, False)
    wanted = spec.spec(DIRECTORY)
    assert DTYPES[wanted.optimisation.dtype] == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    directory = DIRECTORY / "reference"
    prepare(wanted, RunDir(directory), 0, lambda _: None, lambda: False)
    sequences = Sequences(wanted, directory / "data", 0, torch.device("cpu"))
    batches = [torch.cat([batch.tokens for batch in sequences.micro_batches(step)]) for step in range(STEPS)]
    model = build_model(wanted, byte_tokenizer()).float()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    in_fp32 = wanted.model_dump() | {"optimisation": wanted.optimisation.model_dump() | {"dtype": "fp32"}}
    return start, *reference_run(TrainingSpec.model_validate(in_fp32), model, batches)


# A group of ranks trains many cases within the first of them.
@pytest.mark.timeout(60 + 11 * TOGETHER)
@pytest.mark.parametrize("case", parameters())
def test_it_is_the_papers(trained: Path, case: Case) -> None:
    dtype = case.type.partition(",")[0]
    start, expected, losses = reference(case.method, dtype)
    weights = load_arrays(trained / "weights.npz")
    found = [e["loss"] for e in read_json(trained / "answer.json")["events"] if e["type"] == "step"]
    assert weights.keys() == expected.keys()
    deviations, allowed = {}, {}
    for name, whole in expected.items():
        difference = weights[name] - whole
        if dtype == "fp32":
            deviations[name], allowed[name] = float(difference.abs().max()), FP32
        else:
            way = float((whole - start[name]).norm())
            deviations[name] = float(difference.norm()) / way
            allowed[name] = BF16 + ROUNDING[case.type] * float(whole.norm()) / way
    worst = max(deviations, key=lambda name: deviations[name] / allowed[name])
    off = max(abs(a - b) for a, b in zip(found, losses, strict=True))
    if results := os.environ.get("STIEFEL_MATRIX_RESULTS"):
        with Path(results).open("a") as file:
            file.write(json.dumps({"case": astuple(case), "weights": max(deviations.values()), "losses": off}) + "\n")
    assert deviations[worst] < allowed[worst], f"{worst}: {deviations[worst]:.2e}, allowed {allowed[worst]:.2e}"
    assert off < LOSS[dtype]


def test_every_pair_of_values_is_in_the_selection_that_is_always_trained() -> None:
    def pairs(cases: Any) -> set[Any]:
        return {
            ((i, a), (j, b))
            for case in cases
            for i, a in enumerate(astuple(case))
            for j, b in enumerate(astuple(case))
            if i < j
        }

    assert pairs(FEW) == pairs(CASES)
    assert len(FEW) < len(CASES) / 10


def test_what_is_refused_says_what_to_choose_instead_and_the_page_lists_it() -> None:
    assert REFUSED
    page = PAGE.read_text()
    for line in refusals(DIRECTORY):
        assert any(word in line for word in ("use", "leave", "give")), line
        assert line in page, "python -m tests.distributed.report writes it"
