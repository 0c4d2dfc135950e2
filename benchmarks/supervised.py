"""python -m benchmarks.supervised: what the service costs a run: the same job by a worker, and by `python -m trainer`.

In turn, so that whatever else the machine does slows both. Of each run the tokens a second of all steps but the first
quarter, which warms up: switches are in them, evaluations and checkpoints are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import described
from benchmarks.onejob import until_succeeded
from cli.stack import Stack
from trainer import events
from trainer.rundir import RunDir


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    job = {
        "model": {"preset": arguments.model, "vocabulary": 4096},
        "dataset": {"source": "python-stdlib", "sequence_length": 256},
        "method": {"name": "galore", "rank": arguments.rank, "svd": "randomized", "period": 50},
        "optimisation": {"steps": arguments.steps, "global_batch": arguments.batch, "learning_rate": 0.001},
        "resources": {"processes": arguments.ranks},
    }
    runs = []
    for repetition in range(1, arguments.repetitions + 1):
        _say(f"[{repetition}/{arguments.repetitions}] by the service, and by python -m trainer")
        with tempfile.TemporaryDirectory(prefix="stiefel-supervised-") as home:
            supervised = _by_the_service(Path(home), job)
            alone = _by_itself(Path(home) / "alone", supervised.spec.read_bytes())
            runs.append({"service": _tokens_a_second(supervised), "trainer": _tokens_a_second(alone)})
    ratios = [run["service"] / run["trainer"] for run in runs]
    result = described() | {"arguments": vars(arguments), "runs": runs, "ratio": statistics.median(ratios)}
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _by_the_service(home: Path, job: dict[str, Any]) -> RunDir:
    with Stack(home, port=0) as stack:
        client = httpx.Client(base_url=stack.api_url, timeout=30)
        name = client.post("/v1/jobs", json=job).raise_for_status().json()["id"]
        until_succeeded(client, name)
    return RunDir(home / "runs" / name)


def _by_itself(directory: Path, spec: bytes) -> RunDir:
    directory.mkdir()
    rundir = RunDir(directory)
    rundir.spec.write_bytes(spec)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout[-4000:])
    return rundir


def _tokens_a_second(rundir: RunDir) -> float:
    steps = [event for event in events.read(rundir.events) if isinstance(event, events.Step)]
    warm = steps[len(steps) // 4 :]
    tokens = warm[-1].tokens - steps[len(steps) // 4 - 1].tokens
    return tokens / sum(event.seconds for event in warm)


def markdown(result: dict[str, Any]) -> str:
    lines = ["| run | by the service | by `python -m trainer` | ratio |", "|---|---|---|---|"]
    for number, run in enumerate(result["runs"], 1):
        ratio = run["service"] / run["trainer"]
        lines.append(f"| {number} | {run['service']:,.0f} tokens/s | {run['trainer']:,.0f} tokens/s | {ratio:.3f} |")
    lines.append(f"| **median** | | | **{result['ratio']:.3f}** |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supervised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.supervised --model llama-9m --batch 4 --steps 60",
    )
    parser.add_argument("--model", default="llama-1m", help="a preset")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens in a step")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="of each rank; default: as many as there are cores")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
