"""python -m benchmarks.requests: how long the API takes to answer, with thousands of jobs and a million points stored.

The stack of `stiefel up`, a broker and a reaper beside the API, and clients with API keys; its workers are rows of a
table. Requests are sent at their times, whether or not those before them are answered, and the time of an answer counts
from when its request was due: a server that stands still for a second makes everybody behind wait, and that is told.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import event

from benchmarks.machine import described
from benchmarks.stocked import BODY, Stock, stock
from cli.stack import Stack
from jobs import chronicle, keys, schedule, store
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.settings import Settings
from jobs.states import State
from jobs.tables import Point
from migrations.__main__ import upgrade

_OWNERS = 100
# Of a hundred requests.
KINDS = {
    "GET /v1/jobs, everybody's": 20,
    "GET /v1/jobs, one's own": 20,
    "GET /v1/jobs?state=succeeded": 5,
    "GET /v1/jobs/{id}": 35,
    "GET /v1/jobs/{id}, queued": 5,
    "GET …/events of a long job": 5,
    "POST /v1/jobs": 10,
}
_PERCENTILES = (50, 95, 99, 100)


@dataclass(frozen=True)
class Desk:
    """What requests are made of: `keys` are the owners', `admin` sees everything."""

    stock: Stock
    queued: int
    admin: str
    keys: list[str]

    def request(self, kind: str, draw: random.Random) -> dict[str, Any]:
        begun = len(self.stock.jobs) - self.queued
        some, waiting = self.stock.jobs[draw.randrange(begun)], self.stock.jobs[begun + draw.randrange(self.queued)]
        after = f"ftevent-step-{draw.randrange(1, self.stock.steps)}"
        method, url, key = {
            "GET /v1/jobs, everybody's": ("GET", "/v1/jobs", self.admin),
            "GET /v1/jobs, one's own": ("GET", "/v1/jobs", draw.choice(self.keys)),
            "GET /v1/jobs?state=succeeded": ("GET", "/v1/jobs?state=succeeded", self.admin),
            "GET /v1/jobs/{id}": ("GET", f"/v1/jobs/{some}", self.admin),
            "GET /v1/jobs/{id}, queued": ("GET", f"/v1/jobs/{waiting}", self.admin),
            "GET …/events of a long job": (
                "GET",
                f"/v1/fine_tuning/jobs/ft{self.stock.long}/events?after={after}",
                self.admin,
            ),
            "POST /v1/jobs": ("POST", "/v1/jobs", draw.choice(self.keys)),
        }[kind]
        body = {"json": BODY} if method == "POST" else {}
        return {"method": method, "url": url, "headers": {"authorization": f"Bearer {key}"}, **body}


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="stiefel-requests-") as home:
        settings = Settings(home=Path(home), database_url=arguments.database)
        _say(f"storing {arguments.jobs:,} jobs and {arguments.points:,} points")
        desk = _furnish(settings, arguments)
        if arguments.plans:
            print(_plans(settings, desk))
            return
        # A key of an installation may ask ten times a second; the administrator's asks for hundreds of people here.
        environment = {"STIEFEL_AUTH": "on", "STIEFEL_REQUESTS_PER_MINUTE": "1000000"}
        if arguments.database:
            environment["STIEFEL_DATABASE_URL"] = arguments.database
        with Stack(Path(home), port=0, workers=0, environment=environment) as stack:
            asyncio.run(_times(stack.api_url, desk, arguments.rate, 5.0, 0))  # warms up
            runs, busy = [], []
            for repetition in range(1, arguments.repetitions + 1):
                _say(f"[{repetition}/{arguments.repetitions}] {arguments.rate:g} requests/s, {arguments.seconds:g} s")
                before = _processor_seconds(stack.pid("api"))
                runs.append(asyncio.run(_times(stack.api_url, desk, arguments.rate, arguments.seconds, repetition)))
                spent = _processor_seconds(stack.pid("api")) - before
                busy.append(1000 * spent / sum(len(times) for times in runs[-1].values()))
    found, processor = {kind: _figures(kind, runs) for kind in KINDS}, statistics.median(busy)
    about = described() | {"database": "PostgreSQL" if arguments.database.startswith("postgresql") else "SQLite"}
    told = {key: value for key, value in vars(arguments).items() if key != "database"}  # it may hold a password
    answered = {"milliseconds": found, "api_processor_milliseconds_per_request": processor}
    result = about | {"arguments": told} | answered
    print(json.dumps(result, indent=1) if arguments.json else f"{about['machine']}; {markdown(result)}")


def _processor_seconds(pid: int) -> float:
    """That a process has had: what others do on the machine hardly changes it."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _furnish(settings: Settings, arguments: argparse.Namespace) -> Desk:
    upgrade(settings.url)
    database = Database(settings.url)
    owners = [keys.create(database, f"owner {number}", [Scope.WRITE], Quotas()) for number in range(_OWNERS)]
    _, admin = keys.create(database, "admin", [Scope.ADMIN], Quotas())
    database.close()
    ids = [row.id for row, _ in owners]
    stored = stock(settings, ids, arguments.jobs, arguments.points, arguments.queued)
    return Desk(stored, arguments.queued, admin, [key for _, key in owners])


async def _times(url: str, desk: Desk, rate: float, seconds: float, seed: int) -> dict[str, list[float]]:
    """Kind → seconds of each answer, from when its request was due."""
    draw = random.Random(seed)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=round(rate * seconds))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        begin = time.perf_counter() + 0.5

        async def ask(kind: str, request: dict[str, Any], due: float) -> None:
            await asyncio.sleep(due - time.perf_counter())
            answer = await client.request(**request)
            found[kind].append(time.perf_counter() - due)
            if answer.status_code not in (200, 201):
                raise SystemExit(f"{kind}: {answer.status_code} {answer.text}")

        asked = [(kind, desk.request(kind, draw), begin + number / rate) for number, kind in enumerate(kinds)]
        await asyncio.gather(*(ask(*one) for one in asked))
    return found


def _figures(kind: str, runs: list[dict[str, list[float]]]) -> dict[str, float]:
    """Milliseconds: of each run its percentiles, of these the median over the runs."""
    found: dict[str, float] = {"requests": sum(len(run[kind]) for run in runs)}
    for percent in _PERCENTILES:
        each = [_percentile(run[kind], percent) for run in runs if run[kind]]
        found[f"p{percent}" if percent < 100 else "max"] = 1000 * statistics.median(each) if each else math.nan
    return found


def _percentile(seconds: list[float], percent: int) -> float:
    """The smallest that so many in a hundred do not exceed."""
    return sorted(seconds)[max(0, math.ceil(len(seconds) * percent / 100) - 1)]


def _plans(settings: Settings, desk: Desk) -> str:
    """How the database goes about each question that the requests make."""
    database, job = Database(settings.url), desk.stock.jobs[-1]
    owner = store.get(database, job).owner
    asked = {
        "GET /v1/jobs, everybody's": lambda: store.list_jobs(database),
        "GET /v1/jobs, one's own": lambda: store.list_jobs(database, owner),
        "GET /v1/jobs?state=succeeded": lambda: store.list_jobs(database, state=State.SUCCEEDED),
        "GET /v1/jobs?state=succeeded, one's own": lambda: store.list_jobs(database, owner, State.SUCCEEDED),
        "GET /v1/jobs/{id}": lambda: (store.get(database, job), store.attempts(database, job)),
        "GET /v1/jobs/{id}, queued": lambda: schedule.waiting(database, settings, store.get(database, job)),
        "GET …/events of a long job": lambda: chronicle.newest(
            database, desk.stock.long, (Point, desk.stock.steps // 2), 20
        ),
    }
    lines: list[str] = []
    for kind, ask in asked.items():
        with _statements(database) as statements:
            began = time.perf_counter()
            ask()
            lines.append(f"\n{kind}: {1000 * (time.perf_counter() - began):.1f} ms")
        lines += [line for statement in statements for line in _plan(database, *statement)]
    database.close()
    return "\n".join(lines)


@contextmanager
def _statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    found: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        found.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield found
    event.remove(database.engine, "before_cursor_execute", note)


def _plan(database: Database, statement: str, parameters: Any) -> list[str]:
    postgresql = database.engine.dialect.name == "postgresql"
    explain = "EXPLAIN (ANALYZE, COSTS OFF, BUFFERS OFF) " if postgresql else "EXPLAIN QUERY PLAN "
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql(explain + statement, parameters).all()
    shown = " ".join(statement.split())
    tables = shown.partition(" FROM ")[2] or shown
    return [f"  … FROM {tables[:200]}", *(f"      {row[-1]}" for row in rows)]


def markdown(result: dict[str, Any]) -> str:
    asked = result["arguments"]
    jobs, points = f"{asked['jobs']:,} jobs, {asked['queued']:,} of them queued", f"{asked['points']:,} points"
    busy = result["api_processor_milliseconds_per_request"]
    lines = [
        f"{result['database']}; {jobs}, {points}; {asked['rate']:g} requests/s; milliseconds, "
        f" medians of {asked['repetitions']} runs of {asked['seconds']:g} s; "
        f"the API's process was busy for {busy:.1f} ms of a request",
        "",
        "| request | of these | p50 | p95 | p99 | max |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in result["milliseconds"].items():
        cells = " | ".join(f"{row[name]:.1f}" for name in ("p50", "p95", "p99", "max"))
        lines.append(f"| {kind} | {row['requests']:,.0f} | {cells} |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.requests --database postgresql+psycopg://me@127.0.0.1/empty --seconds 60",
    )
    parser.add_argument("--database", default="", metavar="URL", help="an empty one; default: a SQLite file of its own")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--queued", type=int, default=1000, help="of the jobs")
    parser.add_argument("--points", type=int, default=1_000_000, help="half of them of one job")
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30, help="of a run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs")
    parser.add_argument("--plans", action="store_true", help="instead: how the database answers each question")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
