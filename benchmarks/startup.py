"""python -m benchmarks.startup: from POST /v1/jobs to the first training step, on an idle stack, part by part.

The stack of `stiefel up` with one worker that waits for work; each repetition is a job of its own, and the times are
those that the service itself has noted. What a Python that does nothing else takes to import torch, DeepSpeed and the
trainer is measured beside it: most of a start is that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import described
from benchmarks.onejob import until_succeeded
from cli.stack import Stack
from trainer import events
from trainer.rundir import META, RunDir

JOB: dict[str, Any] = {
    "model": {"preset": "llama-1m"},
    "dataset": {"source": "python-stdlib", "sequence_length": 256},
    "method": {"name": "galore", "rank": 32},
    "optimisation": {"steps": 20, "global_batch": 16, "learning_rate": 0.01},
}
_IMPORTS = {
    "import torch": "import torch",
    "import torch, deepspeed": "import os; os.environ['TORCHDYNAMO_DISABLE'] = '1'; import deepspeed",
    "import all that training needs": "import os; os.environ['TORCHDYNAMO_DISABLE'] = '1'; import trainer.train",
}


def main() -> None:
    arguments = _arguments()
    job = JOB | {"deepspeed": {"zero_stage": arguments.stage}, "resources": {"processes": arguments.ranks}}
    starts, imports = [], []
    with tempfile.TemporaryDirectory(prefix="stiefel-startup-") as home, Stack(Path(home), port=0) as stack:
        time.sleep(arguments.idle)  # until the worker has nothing left to do
        for repetition in range(arguments.repetitions):
            _say(f"[{repetition + 1}/{arguments.repetitions}] a job")
            starts.append(_start(stack, Path(home), job))
        for repetition in range(arguments.repetitions):
            _say(f"[{repetition + 1}/{arguments.repetitions}] imports")
            imports.append({name: _python(code) for name, code in _IMPORTS.items()})
    result = described() | {
        "arguments": vars(arguments),
        "seconds": _medians(starts),
        "totals": [sum(start.values()) for start in starts],
        "imports": _medians(imports),
    }
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _start(stack: Stack, home: Path, job: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part, in their order."""
    client = httpx.Client(base_url=stack.api_url, timeout=30)
    posted = time.time()
    answer = client.post("/v1/jobs", json=job).raise_for_status().json()
    answered = time.time()
    rundir = RunDir(home / "runs" / answer["id"])
    until_succeeded(client, answer["id"])
    found = _until_first_step(rundir)
    at = {type(event): event.at for event in reversed(found)}
    moments = {
        "the API answers": answered,
        "a worker has it and starts the trainer": rundir.spec.stat().st_mtime,
        "the trainer imports torch and DeepSpeed": found[0].at,
        "the dataset is made into tokens": (rundir.data / META).stat().st_mtime,
        "model and engine": at[events.Started],
        "the held-out loss before training": at[events.Evaluated],
        "the first step": at[events.Step],
    }
    times = [posted, *moments.values()]
    return {name: later - earlier for name, earlier, later in zip(moments, times, times[1:], strict=False)}


def _until_first_step(rundir: RunDir) -> list[events.Event]:
    found = list(events.read(rundir.events))
    first = next(index for index, event in enumerate(found) if isinstance(event, events.Step))
    return found[: first + 1]


def _python(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def markdown(result: dict[str, Any]) -> str:
    lines = ["| until | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in result["seconds"].items()]
    lines += [f"| **POST to the first step, in all** | **{statistics.median(result['totals']):.2f}** |"]
    lines += [f"| by itself: `{name}` | {seconds:.2f} |" for name, seconds in result["imports"].items()]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.startup --repetitions 5",
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="ZeRO stage")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--idle", type=float, default=5, help="seconds before the first job")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
