"""Hosts and ranks in a spec, the same training on fewer of them, and how a run that was started again has ended."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.distributed.case import spec
from trainer import events
from trainer.config import problems
from trainer.data import Sequences
from trainer.errors import SpecError
from trainer.hosts import for_ranks, for_world
from trainer.launch import _exit_code
from trainer.prepare import prepare
from trainer.resources import Resources
from trainer.rundir import RunDir


def test_a_spec_says_with_how_many_hosts_it_can_do(tmp_path: Path) -> None:
    assert spec(tmp_path, resources={"processes": 2, "hosts": 2}).resources.min_hosts == 2
    assert Resources(processes=2, hosts=3, min_hosts=1).allowed_ranks == (2, 4, 6)


@pytest.mark.parametrize(
    ("resources", "batch", "field", "words"),
    [
        ({"hosts": 2, "min_hosts": 3}, 8, "resources.min_hosts", "min_hosts 3 is above hosts 2; choose at most that"),
        ({"hosts": 1024, "processes": 8}, 8192, "resources.hosts", "are 8192 ranks; at most 4096"),
        (
            {"hosts": 3},
            8,
            "optimisation.global_batch",
            "8 does not divide by hosts 3 × processes 2; choose a multiple of 6",
        ),
        (
            {"hosts": 4, "min_hosts": 2},
            8,
            "optimisation.global_batch",
            "hosts 3 × processes 2; choose a multiple of 24, or a min_hosts above 3",
        ),
        # The smallest batch that every number of hosts can share is longer than a batch may be.
        ({"hosts": 32, "min_hosts": 1}, 64, "optimisation.global_batch", "processes 2; choose a min_hosts above 31"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_field(
    tmp_path: Path, resources: dict[str, int], batch: int, field: str, words: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(tmp_path, resources={"processes": 2} | resources, optimisation={"global_batch": batch})
    [(name, message)] = problems(refused.value)
    assert name == field
    assert words in message


@pytest.mark.parametrize(
    ("micro", "ranks", "expected"),
    [(2, 1, 2), (5, 1, 4), (12, 1, 12), (3, 4, 3), (4, 4, 3), (4, 8, 3), (12, 8, 3), (5, 24, 1)],
)
def test_on_other_ranks_the_micro_batch_is_the_largest_that_fits_what_was_asked(
    tmp_path: Path, micro: int, ranks: int, expected: int
) -> None:
    wanted = spec(tmp_path, resources={"processes": 2}, optimisation={"global_batch": 24})
    optimisation = wanted.optimisation.model_copy(update={"micro_batch": micro})
    found = for_ranks(wanted.model_copy(update={"optimisation": optimisation}), ranks)
    assert found.optimisation.micro_batch == expected
    assert found.resources.ranks == ranks
    # Nothing else has changed, and it is a spec that may be written down.
    changed = {"resources": True, "optimisation": {"micro_batch"}}
    assert found.model_dump(exclude=changed) == wanted.model_dump(exclude=changed)
    assert type(wanted).model_validate_json(found.model_dump_json()) == found


def test_on_other_ranks_every_step_reads_the_same_sequences(tmp_path: Path) -> None:
    wanted = spec(tmp_path, resources={"processes": 1, "hosts": 4, "min_hosts": 2}, optimisation={"global_batch": 12})
    prepare(wanted, RunDir(tmp_path), 0, lambda _: None, lambda: False)

    def rows(ranks: int, step: int) -> list[tuple[int, ...]]:
        on = for_ranks(wanted, ranks)
        found = [Sequences(on, tmp_path / "data", rank, torch.device("cpu")) for rank in range(ranks)]
        batch = torch.cat([micro.tokens for sequences in found for micro in sequences.micro_batches(step)])
        return sorted(tuple(row.tolist()) for row in batch)

    for step in (0, 7):
        assert rows(4, step) == rows(3, step) == rows(2, step) == rows(1, step)
        assert len(rows(3, step)) == 12


def test_a_batch_that_does_not_divide_names_the_field_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"optimisation.global_batch: 8 does not divide by 3 ranks; choose a multiple"):
        for_ranks(spec(tmp_path), 3)


def test_only_the_allowed_numbers_of_ranks_train(tmp_path: Path) -> None:
    wanted = spec(tmp_path, resources={"processes": 2, "hosts": 2, "min_hosts": 1})
    assert for_world(wanted, 4) == wanted
    assert for_world(wanted, 2).resources.hosts == 1
    for world in (1, 3, 8):
        with pytest.raises(SpecError, match=rf"{world} ranks were started.* --nnodes 1:2 --nproc-per-node 2"):
            for_world(wanted, world)


def test_several_hosts_without_torchrun_are_told_what_to_type(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "pair")
    rundir.root.mkdir()
    wanted = spec(tmp_path, resources={"processes": 2, "hosts": 2, "min_hosts": 1})
    rundir.spec.write_text(wanted.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(rundir.root)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 64
    assert "resources.hosts: 2 hosts are started by torchrun" in done.stderr
    [command] = [line for line in done.stderr.splitlines() if "torchrun --" in line]
    assert "--nnodes 1:2 --nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d" in command
    assert command.endswith(f"--rdzv-id pair -m trainer run {rundir.root}")
    assert not rundir.events.exists()


STARTED = {"type": "started", "steps": 9, "processes": 2, "device": "cpu", "parameters": 1, "trained_parameters": 1}
STARTED |= {"optimizer_state_bytes": 1, "full_adamw_state_bytes": 1, "tokens_per_step": 1, "training_tokens": 1}
ROLLED_BACK = {"type": "rolled_back", "from_step": 5, "rate_scale": 0.5, "reason": "step 5: loss nan"}
FINISHED, STOPPED = {"type": "finished", "seconds": 1}, {"type": "stopped"}


def failed(reason: str) -> dict[str, Any]:
    return {"type": "failed", "reason": reason, "message": "", "retryable": True, "rank": 0}


@pytest.mark.parametrize(
    ("happened", "launcher", "code"),
    [
        ([STARTED, failed("unknown"), STARTED, FINISHED], 0, 0),
        ([STARTED, failed("host_gone"), failed("unknown"), STARTED, STOPPED], 0, 0),
        ([STARTED, failed("divergence"), failed("unknown")], 1, 67),
        ([STARTED, failed("unknown"), STARTED, failed("out_of_memory_device"), failed("unknown")], 1, 68),
        ([STARTED, FINISHED, failed("unknown")], 1, 0),
        ([failed("bad_data")], 1, 65),
        ([STARTED], -9, 137),
        ([STARTED, failed("unknown"), STARTED], 1, 1),
        ([STARTED, ROLLED_BACK], 1, 70),
        ([STARTED, ROLLED_BACK, failed("unknown")], 1, 70),
        ([STARTED, failed("out_of_memory_device"), ROLLED_BACK], 1, 68),
        ([STARTED, ROLLED_BACK, STARTED, failed("divergence")], 1, 67),
        ([STARTED, ROLLED_BACK, STARTED, FINISHED], 0, 0),
        ([STARTED, ROLLED_BACK, STOPPED], 0, 0),
    ],
)
def test_the_exit_code_is_of_what_happened_since_the_last_start(
    happened: list[dict[str, Any]], launcher: int, code: int
) -> None:
    found = [events.parse(json.dumps({"step": 1} | event)) for event in happened]
    assert _exit_code(launcher, found) == code


def never() -> bool:
    return False


def test_of_hosts_that_share_a_directory_one_tokenises_and_the_others_find_it_done(tmp_path: Path) -> None:
    wanted, rundir = spec(tmp_path), RunDir(tmp_path / "run")
    told: list[events.Event] = []
    asked = iter([False, True])

    def another_host(stop_requested: Callable[[], bool]) -> bool:
        return prepare(wanted, rundir, 0, told.append, stop_requested)

    def while_tokenising(_: events.Event) -> None:
        # The lock is held now: a second host waits, until it is asked to stop.
        assert not another_host(lambda: next(asked))
        assert not (rundir.data / "meta.json").exists()

    assert prepare(wanted, rundir, 0, while_tokenising, never)
    assert next(asked, None) is None
    made = (rundir.data / "tokens.bin").stat()
    assert another_host(never)
    assert not told
    assert (rundir.data / "tokens.bin").stat() == made
