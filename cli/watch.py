"""A job's progress in a terminal, from its start to its end."""

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from cli.client import Client, Unreachable

ENDED = ("succeeded", "failed", "cancelled", "paused")


def watch(client: Client, job_id: str, console: Console, every: float = 0.5) -> dict[str, Any]:
    """Draw a live bar until the job has ended or is paused; returns its last view.

    An API that is away for a while is waited for: the job does not depend on it.
    """
    columns = (
        TextColumn("{task.fields[state]:9}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task("", total=None, state="…", line="")
        while True:
            try:
                job = client.get(f"/v1/jobs/{job_id}")
            except Unreachable as error:
                bar.update(task, line=escape(str(error)))
                time.sleep(every)
                continue
            progress = job["progress"]
            bar.update(
                task,
                total=progress["steps"],
                completed=progress["step"],
                state=job["state"],
                line=escape(describe(job)),
            )
            if job["state"] in ENDED:
                return dict(job)
            time.sleep(every)


def watch_json(client: Client, job_id: str, every: float = 0.5) -> dict[str, Any]:
    """Print each new step as a JSON line, then the job itself."""
    after = 0
    while True:
        try:
            job = client.get(f"/v1/jobs/{job_id}")
            page = client.get(f"/v1/jobs/{job_id}/metrics", after=after)
        except Unreachable as error:
            print(error, file=sys.stderr)
            time.sleep(every)
            continue
        for point in page["points"]:
            print(json.dumps(point), flush=True)
        after = page["last_step"] or after
        if job["state"] in ENDED and not page["has_more"]:
            print(json.dumps(job), flush=True)
            return dict(job)
        time.sleep(0 if page["has_more"] else every)


def describe(job: dict[str, Any]) -> str:
    """Step, loss, speed, memory and time left, in a line."""
    progress, figures = job["progress"], job["figures"]
    if progress["doing"] and job["state"] == "running":
        return str(progress["doing"])
    parts = [f"step {progress['step']}/{progress['steps']}"]
    if "loss" in figures:
        parts += [f"loss {figures['loss']:.3f}", f"{figures['tokens_per_second']:,.0f} tokens/s"]
        parts.append(size(figures["peak_device_bytes"] or figures["peak_host_bytes"]))
    if progress["eta_seconds"] is not None:
        parts.append(f"{duration(progress['eta_seconds'])} left")
    return "  ".join(parts)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
