"""Several hosts: torchrun's rendezvous, private and shared run directories, and what happens when one is lost.

One machine has to do: the hosts are torchrun agents on loopback, or in network namespaces of their own.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.agents import (
    ROOT,
    SECONDS,
    Agents,
    curve,
    is_pending,
    kill_rank,
    rank_of,
    starts,
    wait_for_checkpoint,
    wait_for_step,
    wait_until,
)
from tests.distributed.case import read_json, spec
from trainer import events
from trainer.checkpoint.place import Directory
from trainer.process import free_port
from trainer.rundir import RunDir

STEPS, EVERY = 100, 5
TWO_HOSTS, ELASTIC = {"processes": 1, "hosts": 2}, {"processes": 1, "hosts": 2, "min_hosts": 1}


def make(directory: Path, name: str, resources: dict[str, int]) -> RunDir:
    optimisation = {"steps": STEPS, "evaluate_every": STEPS}
    wanted = spec(directory, resources=resources, optimisation=optimisation, checkpoints={"every": EVERY})
    rundir = RunDir(directory / name)
    rundir.root.mkdir()
    rundir.spec.write_text(wanted.model_dump_json())
    return rundir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def private(home: Path) -> list[RunDir]:
    """Of an undisturbed run on two hosts that share nothing but the checkpoints."""
    rundirs = [make(home, name, TWO_HOSTS) for name in ("private-0", "private-1")]
    rundirs[0].checkpoints.mkdir()
    rundirs[1].checkpoints.symlink_to(rundirs[0].checkpoints)
    with Agents(home / "logs-private") as agents:
        agents.wait(*[agents.start(rundir, place) for place, rundir in enumerate(rundirs)])
    return rundirs


@pytest.fixture(scope="module")
def undisturbed(private: list[RunDir]) -> dict[int, float]:
    losses = curve(private[0]) or curve(private[1])
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_two_hosts_train_what_two_ranks_of_one_host_train_to_the_bit(home: Path, undisturbed: dict[int, float]) -> None:
    rundir = make(home, "one-host", {"processes": 2})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "run", str(rundir.root)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert curve(rundir) == undisturbed


def test_hosts_with_private_directories_tokenise_each_and_one_of_them_reports(private: list[RunDir]) -> None:
    tokens = [(rundir.data / "tokens.bin").read_bytes() for rundir in private]
    assert tokens[0] == tokens[1]
    assert sorted(bool(events.read(rundir.events)) for rundir in private) == [False, True]


def test_a_killed_rank_is_started_again_and_the_curve_is_that_of_an_undisturbed_run(
    home: Path, undisturbed: dict[int, float]
) -> None:
    rundir = make(home, "killed-rank", TWO_HOSTS)
    with Agents(home / "logs-killed-rank") as agents:
        both = [agents.start(rundir, place) for place in (0, 1)]
        wait_for_checkpoint(rundir)
        kill_rank(both[1])
        agents.wait(*both)
    assert curve(rundir) == undisturbed
    (_, before), (resumed, after) = starts(rundir)
    assert (before, after) == (2, 2)
    assert resumed >= EVERY
    assert isinstance(events.ending(events.read(rundir.events)), events.Finished)


def test_without_a_lost_host_the_other_goes_on_alone_where_min_hosts_allows(
    home: Path, undisturbed: dict[int, float]
) -> None:
    rundir = make(home, "lost-host", ELASTIC)
    with Agents(home / "logs-lost-host", nnodes="1:2") as agents:
        stays, goes = (agents.start(rundir, place) for place in (0, 1))
        wait_for_checkpoint(rundir)
        goes.kill()
        agents.wait(stays)
    assert curve(rundir) == pytest.approx(undisturbed, abs=1e-6)
    ranks = [ranks for _, ranks in starts(rundir)]
    assert ranks[-1] == 1
    assert 2 in ranks
    assert starts(rundir)[-1][0] >= EVERY


@pytest.mark.matrix
def test_a_host_that_joins_later_trains_with_those_that_began(home: Path, undisturbed: dict[int, float]) -> None:
    rundir = make(home, "joined", ELASTIC)
    with Agents(home / "logs-joined", nnodes="1:2") as agents:
        began = agents.start(rundir, 0)
        wait_for_checkpoint(rundir)
        # Or the run would be over before the other host is there.
        rank = rank_of(began)
        rank.suspend()
        joins = agents.start(rundir, 1)
        wait_until(lambda: is_pending(signal.SIGTERM, rank.pid))
        rank.resume()
        agents.wait(began, joins)
    assert curve(rundir) == pytest.approx(undisturbed, abs=1e-6)
    assert [ranks for _, ranks in starts(rundir)] == [1, 2]
    steps = [event.step for event in events.read(rundir.events) if isinstance(event, events.Step)]
    assert steps == sorted(set(steps)), "a step was trained twice"


@pytest.mark.matrix
@pytest.mark.parametrize("way", ["killed", "asked"])
def test_a_host_in_place_of_a_lost_one_takes_up_its_part(home: Path, undisturbed: dict[int, float], way: str) -> None:
    rundir = make(home, f"replaced-{way}", TWO_HOSTS)
    with Agents(home / f"logs-replaced-{way}") as agents:
        stays, goes = (agents.start(rundir, place) for place in (0, 1))
        wait_for_checkpoint(rundir)
        if way == "killed":
            goes.kill()
        else:
            goes.terminate()  # as a cluster does that drains a host: nothing of what was trained is lost
        goes.wait()
        agents.wait(stays, agents.start(rundir, 1))
    assert curve(rundir) == undisturbed
    (_, before), (resumed, after) = starts(rundir)
    assert (before, after) == (2, 2)
    steps = [event.step for event in events.read(rundir.events) if isinstance(event, events.Step)]
    assert (len(steps) == STEPS) == (way == "asked")
    assert resumed >= EVERY


@pytest.mark.matrix
def test_without_the_host_of_the_rendezvous_all_end_and_can_be_started_again(
    home: Path, undisturbed: dict[int, float]
) -> None:
    rundir = make(home, "lost-first", TWO_HOSTS)
    with Agents(home / "logs-lost-first") as agents:
        first, second = (agents.start(rundir, place) for place in (0, 1))
        wait_for_checkpoint(rundir)
        first.kill()
        assert second.wait(SECONDS) != 0
        agents.wait(*[agents.start(rundir, place) for place in (0, 1)])
    assert curve(rundir) == undisturbed
    assert [step >= EVERY for step, _ in starts(rundir)] == [False, True]


@pytest.mark.matrix
def test_a_stop_file_ends_the_run_on_every_host(home: Path) -> None:
    rundir = make(home, "stopped", TWO_HOSTS)
    with Agents(home / "logs-stopped") as agents:
        both = [agents.start(rundir, place) for place in (0, 1)]
        wait_for_step(rundir, 1)
        rundir.stop.touch()
        agents.wait(*both)
    last = events.read(rundir.events)[-1]
    assert isinstance(last, events.Stopped)
    assert Directory(rundir.checkpoints).complete_steps()[-1] == last.step
    assert last.step < STEPS


@pytest.mark.matrix
def test_a_rollback_starts_the_ranks_of_every_host_again(home: Path) -> None:
    # At this rate the loss leaves after a step; with a thousandth of it training is quick.
    optimisation = {"steps": 12, "learning_rate": 10.0, "warmup_steps": 0, "evaluate_every": 4}
    guard = {"on_divergence": "roll_back", "rate_factor": 0.001}
    wanted = spec(home, method="full", resources=TWO_HOSTS, optimisation=optimisation, guard=guard)
    rundir = RunDir(home / "rolled-back")
    rundir.root.mkdir()
    rundir.spec.write_text(wanted.model_dump_json())
    with Agents(home / "logs-rolled-back") as agents:
        agents.wait(*[agents.start(rundir, place) for place in (0, 1)])
    found = list(events.read(rundir.events))
    [back] = [event for event in found if isinstance(event, events.RolledBack)]
    steps = [event.step for event in found[found.index(back) :] if isinstance(event, events.Step)]
    assert steps == list(range(back.step + 1, 13))
    assert starts(rundir) == [(0, 2), (back.step, 2)]
    assert isinstance(found[-1], events.Finished)


@pytest.fixture
def namespaces() -> Iterator[list[tuple[list[str], str, str]]]:
    """Two network namespaces with one cable between them."""
    tag = secrets.token_hex(3)
    names = [f"stiefel-{tag}-{number}" for number in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for number, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
                for interface in ("lo", "cable"):
                    ip("-n", name, "link", "set", interface, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield [(["ip", "netns", "exec", name], f"10.77.0.{n + 1}", "cable") for n, name in enumerate(names)]
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.mark.matrix
def test_hosts_that_share_no_network_but_a_cable_train_the_same(
    home: Path, undisturbed: dict[int, float], namespaces: list[tuple[list[str], str, str]]
) -> None:
    rundir = make(home, "namespaces", TWO_HOSTS)
    with Agents(home / "logs-namespaces", places=namespaces) as agents:
        agents.wait(*[agents.start(rundir, place) for place in (0, 1)])
    assert curve(rundir) == undisturbed


@pytest.fixture(scope="module")
def answers(home: Path) -> Any:
    """What two ranks with directories of their own said to each other in the cases of tests.distributed.meeting."""
    directory = home / "meeting"
    directory.mkdir()
    spec(directory)  # writes the text
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "tests.distributed.meeting", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_json(directory / "answers.json")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("spec", ["optimisation.learning_rate: 0.02 in", "0.01 in that of rank 0", "same spec.json"]),
        ("data", ["dataset: rank 1 on", "other tokens", "delete"]),
        ("checkpoints", ["resources.hosts:", "which is not where those of rank 0", "mount the same directory"]),
    ],
)
def test_hosts_that_would_train_apart_are_told_before_the_first_step(answers: Any, case: str, words: list[str]) -> None:
    # Both ranks raise the same, or the others would wait for the one that did.
    first, second = answers[case]
    assert first == second
    assert all(word in first for word in words), first


def test_hosts_that_agree_go_on_and_one_that_was_stopped_stops_all(answers: Any) -> None:
    assert answers["same"] == [True, True]
    assert answers["stopped"] == [False, False]
