"""python -m benchmarks.supervised: what the service costs a run that it supervises, beside the same run by itself.

One run, by a worker of the stack of `stiefel up`. In turn the service's processes (API, broker, reaper, worker) go on,
and are stopped by a signal: then the trainer has the machine for itself, as `python -m trainer` has. A second run would
be a worse comparison: on a shared machine minutes differ by more than what is looked for. Steps that lie in both states
are left out. A pair is two such windows next to each other.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import described
from cli.stack import Stack
from jobs.settings import Settings
from trainer import events
from trainer.rundir import RunDir

_WARM_UP = 10  # steps
_PATIENCE_SECONDS = 120


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="stiefel-supervised-") as home, Stack(Path(home), port=0) as stack:
        client = httpx.Client(base_url=stack.api_url, timeout=30)
        name = client.post("/v1/jobs", json=_job(arguments)).raise_for_status().json()["id"]
        rundir = RunDir(Path(home) / "runs" / name)
        _until_warm(rundir)
        windows = []
        for number in range(1, arguments.pairs + 1):
            _say(f"[{number}/{arguments.pairs}] with the service, then without")
            windows += [("service", *_wait(arguments.window))]
            with _stopped(stack):
                windows += [("alone", *_wait(arguments.window))]
        found = [event for event in events.read(rundir.events) if isinstance(event, events.Step)]
    seconds = [(state, _seconds_of_a_step(found, begin, end)) for state, begin, end in windows]
    pairs = [
        {"service": with_it, "alone": without}
        for (_, with_it), (_, without) in zip(seconds[::2], seconds[1::2], strict=True)
    ]
    ratios = [pair["alone"] / pair["service"] for pair in pairs]
    result = described() | {"arguments": vars(arguments), "pairs": pairs, "ratio": statistics.median(ratios)}
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"preset": arguments.model, "vocabulary": 4096},
        "dataset": {"source": "python-stdlib", "sequence_length": 256},
        "method": {"name": "galore", "rank": arguments.rank, "svd": "randomized", "period": 50},
        "optimisation": {"steps": 10**6, "global_batch": arguments.batch, "learning_rate": 0.001},
        "resources": {"processes": arguments.ranks},
    }


def _until_warm(rundir: RunDir) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not rundir.events.exists() or rundir.events.read_text().count('"type":"step"') < _WARM_UP:
        if time.monotonic() > end:
            raise SystemExit(f"no {_WARM_UP} steps in {_PATIENCE_SECONDS} s; see {rundir.path}")
        time.sleep(0.5)


def _wait(seconds: float) -> tuple[float, float]:
    begin = time.time()
    time.sleep(seconds)
    return begin, time.time()


@contextmanager
def _stopped(stack: Stack) -> Iterator[None]:
    """All that the stack has started, but for the trainers."""
    processes = [process for name in stack.children for process in _service_of(psutil.Process(stack.pid(name)))]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def _service_of(process: psutil.Process) -> list[psutil.Process]:
    """A process and what it has started, down to where a trainer begins."""
    if process.cmdline()[1:4] == ["-m", "trainer", "run"]:
        return []
    return [process, *(one for child in process.children() for one in _service_of(child))]


def _seconds_of_a_step(found: list[events.Step], begin: float, end: float) -> float:
    """The mean of the steps that lie between two times; `at` is when a step has ended."""
    whole = [event.seconds for event in found if begin < event.at - event.seconds and event.at < end]
    if not whole:
        raise SystemExit("no whole step in a window; give a longer --window or a smaller --batch")
    return statistics.mean(whole)


def markdown(result: dict[str, Any]) -> str:
    pairs, asked = result["pairs"], result["arguments"]
    ratios = sorted(pair["alone"] / pair["service"] for pair in pairs)
    with_it, without = (statistics.median(pair[state] for pair in pairs) for state in ("service", "alone"))
    quarters = statistics.quantiles(ratios, n=4)
    return "\n".join(
        [
            f"| a step | by itself | supervised | tokens/s, ratio: median of {len(pairs)} pairs | quartiles |",
            "|---|---|---|---|---|",
            f"| {asked['model']}, {asked['batch']} × 256 tokens, {asked['threads'] or 'all'} threads "
            f"| {1000 * without:.0f} ms | {1000 * with_it:.0f} ms "
            f"| {result['ratio']:.3f} | {quarters[0]:.3f} to {quarters[2]:.3f} |",
        ]
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supervised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.supervised --model llama-9m --batch 4 --pairs 10",
    )
    parser.add_argument("--model", default="llama-1m", help="a preset")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens in a step")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="of each rank; default: as many as there are cores")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--window", type=float, default=6, help=f"seconds; below a lease's, {_lease():g}")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


def _lease() -> float:
    return float(Settings.model_fields["lease_seconds"].default)


if __name__ == "__main__":
    main()
