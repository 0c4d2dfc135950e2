"""Hosts as far as one machine has them: torchrun agents that know each other by address alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from trainer import events
from trainer.checkpoint.place import Directory
from trainer.process import free_port
from trainer.rundir import RunDir

ROOT = Path(__file__).parents[2]
SECONDS = 200.0
# Torchrun's own would make a lost host a matter of a minute.
QUICK = "join_timeout=120,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


@dataclass
class Agents:
    """torchrun on hosts that are processes here. The first one keeps the rendezvous, as --rdzv-endpoint says.

    `places`: for each host, what to put before its command, its address and its network interface.
    """

    logs: Path
    nnodes: str = "2"
    places: list[tuple[list[str], str, str]] = field(default_factory=lambda: [([], "127.0.0.1", "lo")] * 2)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> "Agents":
        self.port = free_port()
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.started:
            agent.kill()  # its ranks follow
            agent.wait()

    def start(self, rundir: RunDir, place: int) -> subprocess.Popen[bytes]:
        prefix, address, interface = self.places[place]
        command = [
            *(*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", self.nnodes, "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.places[0][1]}:{self.port}", "--rdzv-id", "test"),
            *("--rdzv-conf", f"{QUICK},is_host={int(place == 0)}", "--local-addr", address, "--max-restarts", "3"),
            *("-m", "trainer", "run", str(rundir.root)),
        ]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self._log(len(self.started)).open("wb") as log:
            agent = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.started.append(agent)
        return agent

    def wait(self, *agents: subprocess.Popen[bytes]) -> None:
        """For each to end well."""
        for agent in agents:
            code = agent.wait(SECONDS)
            logs = "\n".join(self._log(number).read_text()[-3000:] for number in range(len(self.started)))
            assert code == 0, f"an agent ended with {code}\n{logs}"

    def _log(self, number: int) -> Path:
        return self.logs / f"agent-{number}.log"


def rank_of(agent: subprocess.Popen[bytes]) -> psutil.Process:
    """The one rank of this host."""
    return next(p for p in psutil.Process(agent.pid).children(recursive=True) if "trainer" in p.cmdline())


def kill_rank(agent: subprocess.Popen[bytes]) -> None:
    rank_of(agent).send_signal(signal.SIGKILL)


def is_pending(number: signal.Signals, pid: int) -> bool:
    """Whether a suspended process has been sent this signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_for_step(rundir: RunDir, step: int) -> None:
    wait_until(lambda: max(curve(rundir), default=0) >= step)


def wait_for_checkpoint(rundir: RunDir) -> None:
    """For one to go on from."""
    wait_until(lambda: bool(Directory(rundir.checkpoints).complete_steps()))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def curve(rundir: RunDir) -> dict[int, float]:
    """Step → loss. What was trained again after a restart counts as it was the last time."""
    return {event.step: event.loss for event in events.read(rundir.events) if isinstance(event, events.Step)}


def starts(rundir: RunDir) -> list[tuple[int, int]]:
    """(step, ranks) of each time that training began."""
    return [(e.step, e.processes) for e in events.read(rundir.events) if isinstance(e, events.Started)]
