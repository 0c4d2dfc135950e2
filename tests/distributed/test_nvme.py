"""State and parameters in files are the same run as in memory, and are really in files.

Needs DeepSpeed's async_io, which is compiled at its first use and takes minutes; hence `make test-matrix` only. What is
smaller than a mebibyte stays in memory, so the model is larger than those of the other tests.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import LlamaConfig

from tests.distributed.case import load_arrays, read_json, spec
from tests.distributed.group import run_group
from tests.distributed.matrix import METHODS
from trainer import events
from trainer.rundir import RunDir

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]
STEPS, SAVED = 5, 3
MODEL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
MEMORY: dict[str, Any] = {"zero_stage": 3, "persistence_threshold": 0}
STATE = MEMORY | {"offload": "nvme"}
ALL = STATE | {"offload_parameters": "nvme"}
ENGINES = {"memory": MEMORY, "state": STATE, "all": ALL}
# Their parameters are not all of one type, and are refused.
INTEGERS = {"gasare", "gosare", "sltrain"}
# These keep no large frozen weights; what is trained is in memory for the forward pass.
TRAINED = {"full", "loro", "loro, preconditioned", "lowrank"}


@pytest.fixture(scope="module", autouse=True)
def asynchronous_io() -> None:
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io cannot be built here: install libaio-dev, ninja and a C++ compiler")
    AsyncIOBuilder().load(verbose=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nvme")
    LlamaConfig(vocab_size=261, tie_word_embeddings=True, **MODEL).save_pretrained(directory / "model")
    return directory


def case(directory: Path, name: str, ranks: int, method: str, engine: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One to be trained into the folder `name` of `directory`, with its files in another beside it."""
    files = directory / f"{name}-files"
    files.mkdir(parents=True)
    settings = METHODS[method]
    if "rank" in settings:
        # Large enough for a group's moments to be worth a file on each of two ranks.
        settings = settings | {"rank": 128}
    optimisation = {"steps": STEPS, "global_batch": 4, "micro_batch": 4 // ranks, "learning_rate": 0.001}
    wanted = spec(
        directory,
        model={"path": str(directory / "model"), "weights": "random"},
        tokenizer="bytes",
        dataset={"sequence_length": 16},
        method=settings,
        deepspeed=engine | {"nvme_path": str(files)},
        optimisation=optimisation | changes,
        resources={"processes": ranks},
    )
    # Several groups, as a larger model has them.
    groups = {"zero_optimization": {"sub_group_size": 2**19}} if "offload" in engine else {}
    return {
        "directory": str(directory / name),
        "spec": wanted.model_dump(mode="json"),
        "steps": STEPS,
        "deepspeed": groups,
    }


def losses(directory: Path) -> list[float]:
    return [event["loss"] for event in read_json(directory / "answer.json")["events"] if event["type"] == "step"]


def assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert len(losses(one)) == STEPS
    weights, expected = load_arrays(one / "weights.npz"), load_arrays(other / "weights.npz")
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, directory: Path) -> Path:
    """All methods in memory, with state in files, and with all in files, where it can be."""
    place = directory / f"{request.param}-ranks"
    cases = [
        case(directory, f"{place.name}/{method}-{name}", request.param, method, engine)
        for method in METHODS
        for name, engine in ENGINES.items()
        if name != "all" or method not in INTEGERS
    ]
    run_group(place, request.param, cases, timeout=1200)
    return place


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_bit_equal_with_files_and_without(trained: Path, method: str) -> None:
    in_memory = read_json(trained / f"{method}-memory" / "answer.json")
    inside, state_bytes = in_memory["live"], in_memory["state_bytes"]
    for name in ["state"] if method in INTEGERS else ["state", "all"]:
        assert_same(trained / f"{method}-{name}", trained / f"{method}-memory")
        # What the ranks hold of moments is in files but for the last and the small groups.
        answer = read_json(trained / f"{method}-{name}" / "answer.json")
        held = answer["live"]
        assert held["moments"] < inside["moments"] / 3
        # What is in files is counted too; groups are padded to a multiple of the ranks and of an alignment.
        assert answer["state_bytes"] == pytest.approx(state_bytes, rel=0.01)
        assert any((trained / f"{method}-{name}-files").rglob("optimizer/rank0/*.swp"))
    if method not in INTEGERS | TRAINED:
        assert held["parameters"] < inside["parameters"] / 1.5
        assert any((trained / f"{method}-all-files").rglob("float32params/rank0/*.swp"))


@pytest.mark.parametrize("method", ["galore", "relora"])
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"dtype": "bf16", "merge": "fp32"},
        {"dtype": "bf16", "merge": "stochastic"},
        {"micro_batch": 1, "activation_checkpointing": True},
    ],
    ids=["bf16", "fp32-copy", "stochastic", "accumulation-recomputing"],
)
def test_types_and_accumulation_change_nothing(directory: Path, method: str, changes: dict[str, Any]) -> None:
    place = directory / f"{method}-{'-'.join(str(value) for value in changes.values())}"
    engines = {"memory": MEMORY, "all": ALL}
    run_group(
        place, 2, [case(directory, f"{place.name}/{name}", 2, method, e, **changes) for name, e in engines.items()]
    )
    assert_same(place / "all", place / "memory")
    assert any((place / "all-files").rglob("*params/rank0/*.swp"))


@pytest.mark.parametrize("method", ["full", "galore", "relora"])
def test_a_run_is_resumed_from_files_into_memory_and_back(directory: Path, method: str) -> None:
    place = directory / f"{method}-resumed"
    engines = {"memory": MEMORY, "into": ALL, "out": MEMORY}
    cases = {name: case(directory, f"{place.name}/{name}", 2, method, e) for name, e in engines.items()}
    for name, other in (("into", "memory"), ("out", "into")):
        cases[name] |= {"save_at": [SAVED], "resume_as": cases[other]["spec"]}
    run_group(place, 2, list(cases.values()))
    assert_same(place / "into", place / "memory")
    assert_same(place / "out", place / "memory")


def test_a_run_leaves_nothing_on_the_disk(directory: Path) -> None:
    made = case(directory, "command", 2, "galore", ALL)
    rundir, disk = RunDir(made["directory"]), Path(made["spec"]["deepspeed"]["nvme_path"])
    rundir.root.mkdir()
    rundir.spec.write_text(json.dumps(made["spec"]))
    untouched = disk.stat().st_mtime_ns
    subprocess.run([sys.executable, "-m", "trainer", "run", made["directory"]], check=True, stdout=subprocess.DEVNULL)
    assert isinstance(events.ending(events.read(rundir.events)), events.Finished)
    assert list(disk.iterdir()) == []
    assert disk.stat().st_mtime_ns > untouched, "it was not used"
