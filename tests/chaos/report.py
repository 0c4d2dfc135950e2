"""A campaign's result for people (Markdown) and for machines (JSON)."""

import json
from collections import Counter
from typing import Any

from tests.chaos.campaign import Result
from tests.chaos.plan import KINDS


def as_data(result: Result) -> dict[str, Any]:
    plan = result.plan
    return {
        "verdict": "kept" if result.kept else "broken",
        "seed": plan.seed,
        "database": plan.database,
        "seconds": round(result.seconds, 1),
        "faults": {kind: {"struck": result.struck[kind], "missed": result.missed[kind]} for kind in _used(result)},
        "jobs": [
            {
                "id": job.job_id,
                "spec": job.spec,
                "state": job.state,
                "steps": job.curve.steps,
                "attempts": dict(Counter(job.attempts)),
            }
            for job in result.jobs
        ],
        "looks": result.looks,
        "looks_with_a_trainer": result.trainers_seen,
        "broken": [{"promise": b.promise, "where": b.where, "evidence": b.evidence} for b in result.broken],
        "evidence": str(result.home),
    }


def as_json(results: list[Result]) -> str:
    return json.dumps([as_data(result) for result in results], indent=1)


def as_markdown(results: list[Result]) -> str:
    return "\n".join(_section(result) for result in results)


def _section(result: Result) -> str:
    plan = result.plan
    states, outcomes = (
        Counter(job.state for job in result.jobs),
        Counter(a for job in result.jobs for a in job.attempts),
    )
    lines = [
        f"## Seed {plan.seed}, {plan.database}: {'every promise kept' if result.kept else 'PROMISES BROKEN'}",
        "",
        f"{sum(result.struck.values())} faults of {len(+result.struck)} kinds in {plan.seconds:g} s; "
        f"after {result.seconds:.0f} s all was over. {len(result.jobs)} jobs: {_counts(states)}. "
        f"{sum(outcomes.values())} attempts: {_counts(outcomes)}. "
        f"{result.looks} looks at the processes, {result.trainers_seen} of them found a trainer.",
        "",
        *(f"- **{b.promise}**: {b.where}: {b.evidence}" for b in result.broken),
        *([f"- evidence: {result.home}", ""] if result.broken else []),
        "| fault | struck | nothing to hit |",
        "|---|--:|--:|",
        *(f"| {kind} | {result.struck[kind]} | {result.missed[kind]} |" for kind in _used(result)),
        "",
    ]
    return "\n".join(lines)


def _used(result: Result) -> list[str]:
    return [kind for kind in KINDS if result.struck[kind] or result.missed[kind]]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"
