"""python -m benchmarks.ingest: how many points a second get from running jobs' files into the database, and how late.

Each job has a process of its own, as its worker is one: it writes the lines that its trainer would have written by
then, reads them as the worker does, and stores them under the job's lease. Lag is from the time of a batch's oldest
point to its commit: at least a second of a worker that looks every second. Where the last third of a run has a much
larger one than the first, the database does not keep up.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from benchmarks.machine import described
from benchmarks.stocked import BODY
from jobs import lease as leases
from jobs import reports, submission
from jobs.database import Database
from jobs.lease import Lease
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.tables import Point
from migrations.__main__ import upgrade
from trainer import events

_THIRDS = ("first", "middle", "last")


@dataclass(frozen=True)
class Task:
    """What a process does: `rate` points a second for `seconds`, beginning `wait` seconds after all are there."""

    settings: Settings
    lease: Lease
    rate: float
    seconds: float
    wait: float


@dataclass(frozen=True)
class Told:
    """Of each batch of a process the time of its oldest point, since the beginning, and its lag; all in seconds."""

    batches: list[tuple[float, float]]
    processor_seconds: float


def main() -> None:
    arguments = _arguments()
    runs = []
    with tempfile.TemporaryDirectory(prefix="stiefel-ingest-") as home:
        settings = Settings(home=Path(home), database_url=arguments.database, lease_seconds=3600)
        upgrade(settings.url)
        for repetition in range(1, arguments.repetitions + 1):
            asked = f"{arguments.rate:,.0f} points/s of {arguments.jobs} jobs for {arguments.seconds:g} s"
            print(f"[{repetition}/{arguments.repetitions}] {asked}", file=sys.stderr, flush=True)
            runs.append(_run(settings, arguments))
    about = described() | {"database": "PostgreSQL" if arguments.database.startswith("postgresql") else "SQLite"}
    told = {key: value for key, value in vars(arguments).items() if key != "database"}  # it may hold a password
    result = about | {"arguments": told, "runs": runs}
    print(json.dumps(result, indent=1) if arguments.json else f"{about['machine']}; {markdown(result)}")


def _run(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    held = _claim(settings, arguments.jobs)
    context, rate = multiprocessing.get_context("spawn"), arguments.rate / arguments.jobs
    # Not all look at the same moment: workers were started at different times.
    waits = [settings.poll_seconds * number / arguments.jobs for number in range(arguments.jobs)]
    tasks = [Task(settings, lease, rate, arguments.seconds, wait) for lease, wait in zip(held, waits, strict=True)]
    with context.Pool(arguments.jobs, _meet_at, (context.Barrier(arguments.jobs),)) as pool:
        told = pool.map(_work, tasks, chunksize=1)
    database = Database(settings.url)
    with database.reading() as session:
        mine = Point.job_id.in_([lease.job_id for lease in held])
        stored = session.scalar(select(func.count()).where(mine)) or 0
    database.close()
    batches = [batch for one in told for batch in one.batches]
    thirds: list[list[float]] = [[], [], []]
    for at, lag in batches:
        thirds[min(2, int(3 * at / arguments.seconds))].append(lag)
    return {
        "points": stored,
        "points_per_second": stored / max(at + lag for at, lag in batches),
        "lag_seconds": {
            name: {"median": statistics.median(lags), "p99": _percentile(lags, 99), "max": max(lags)}
            for name, lags in zip(_THIRDS, thirds, strict=True)
        },
        "processor_milliseconds_per_point": 1000 * sum(one.processor_seconds for one in told) / stored,
    }


def _claim(settings: Settings, jobs: int) -> list[Lease]:
    database = Database(settings.url)
    found = []
    for number in range(jobs):
        job = submission.create(database, settings, JobRequest.model_validate(BODY))
        lease = leases.claim(database, settings, job.id, f"worker-{number}")
        assert lease is not None
        found.append(lease)
    database.close()
    return found


def _meet_at(barrier: Any) -> None:
    """In a new process."""
    global _all_there
    _all_there = barrier


_all_there: Any = None


def _work(task: Task) -> Told:
    """Look every so many seconds, as `worker.supervise` does."""
    database = Database(task.settings.url)
    file = task.settings.runs / f"{task.lease.job_id}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    poll, offset, written, stored = task.settings.poll_seconds, 0, 0, 0
    found: list[tuple[float, float]] = []
    _all_there.wait()
    begin = time.time()
    time.sleep(task.wait)
    before = psutil.Process().cpu_times()
    next_beat = time.time() + task.settings.beat_seconds
    while stored < int(task.rate * task.seconds):
        looked = time.time()
        newest = int(task.rate * min(looked - begin, task.seconds))
        with file.open("ab") as lines:
            for number in range(written + 1, newest + 1):
                lines.write(_line(number, begin + number / task.rate))
        batch, behind = events.read_from(file, offset)
        written = newest
        try:
            if time.time() > next_beat:
                leases.beat(database, task.settings, task.lease)
                next_beat += task.settings.beat_seconds
            if batch:
                reports.record(database, task.lease, batch, behind)
                oldest = (stored + 1) / task.rate
                found.append((oldest, time.time() - begin - oldest))
                offset, stored = behind, newest
        except DBAPIError:
            print("the database is away; points wait in their file", file=sys.stderr)
        time.sleep(max(0.0, looked + poll - time.time()))
    after = psutil.Process().cpu_times()
    database.close()
    return Told(found, after.user + after.system - before.user - before.system)


def _line(number: int, at: float) -> bytes:
    step = events.Step(
        at=at,
        step=number,
        loss=3.0 + 1.0 / number,
        learning_rate=0.01,
        gradient_norm=1.0,
        tokens=131072 * number,
        seconds=0.004,
        projection_seconds=0.0,
        tokens_per_second=131072.0,
        peak_device_bytes=None,
        peak_host_bytes=1_000_000_000,
    )
    return step.model_dump_json().encode() + b"\n"


def _percentile(seconds: list[float], percent: int) -> float:
    return sorted(seconds)[max(0, math.ceil(len(seconds) * percent / 100) - 1)]


def markdown(result: dict[str, Any]) -> str:
    asked = result["arguments"]
    jobs = f"{asked['jobs']} jobs for {asked['seconds']:g} s"
    lines = [
        f"{result['database']}; {asked['rate']:,.0f} points/s asked of {jobs}; lag in seconds",
        "",
        "| run | points/s | "
        + " | ".join(f"{name} third: median, p99, max" for name in _THIRDS)
        + " | processor ms a point |",
        "|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(result["runs"], 1):
        lags = [run["lag_seconds"][name] for name in _THIRDS]
        cells = " | ".join(f"{lag['median']:.2f}, {lag['p99']:.2f}, {lag['max']:.2f}" for lag in lags)
        processor = run["processor_milliseconds_per_point"]
        lines.append(f"| {number} | {run['points_per_second']:,.0f} | {cells} | {processor:.3f} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.ingest --database postgresql+psycopg://me@127.0.0.1/empty --rate 10000",
    )
    parser.add_argument("--database", default="", metavar="URL", help="default: a SQLite file of its own")
    parser.add_argument("--jobs", type=int, default=20, help="that run at the same time")
    parser.add_argument("--rate", type=float, default=5000, help="points a second, of all jobs together")
    parser.add_argument("--seconds", type=float, default=30, help="of a run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
