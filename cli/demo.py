"""The whole way once, on this machine: a stack, a job, a live bar, a table."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.client import Client, Refused
from cli.stack import Stack
from cli.watch import size, watch

JOB = {
    "name": "demo",
    "model": {"preset": "llama-1m"},
    "dataset": {"source": "python-stdlib", "sequence_length": 256, "validation_fraction": 0.01},
    "method": {"name": "galore", "rank": 32, "period": 50},
    "optimisation": {
        "steps": 200,
        "global_batch": 16,
        "learning_rate": 0.01,
        "warmup_steps": 10,
        "evaluate_every": 50,
        "evaluation_sequences": 64,
    },
    "deepspeed": {"zero_stage": 2},
    "checkpoints": {"every": 100},
}


def demo(home: Path, port: int, console: Console) -> None:
    """Raises Refused when the job does not succeed."""
    with Stack(home, port=port) as stack:
        console.print(f"[bold]Stiefel[/] is up at {stack.api_url} (SQLite, {broker_name(stack)}, API, one worker)\n")
        client = Client(stack.api_url)
        job = client.post("/v1/jobs", JOB)
        console.print(f"POST /v1/jobs → {job['id']}:\n  {_described(job)}", soft_wrap=True)
        job = watch(client, job["id"], console)
        if job["state"] != "succeeded":
            raise Refused(f"the demo's job {job['state']}: {job['error']}")
        console.print()
        console.print(_table(client, job))
        _print_urls(console, stack, job)
        if sys.stdin.isatty():
            console.print("\nThe stack stays up for you to look. Press Enter to end it.")
            sys.stdin.readline()
        else:
            console.print(f"\nThe stack ends now; stiefel up --home {home} --port {stack.port} shows it all again.")


def broker_name(stack: Stack) -> str:
    broker = stack.children.get("broker")
    return Path(broker.command[0]).name if broker else "your broker"


def _described(job: dict[str, Any]) -> str:
    spec = job["spec"]
    method = spec["method"]
    return (
        f"{spec['model']['preset']}, {method['name']} r={method['rank']} τ={method['period']}, "
        f"{spec['dataset']['source']}, {spec['optimisation']['steps']} steps of {spec['optimisation']['global_batch']}×"
        f"{spec['dataset']['sequence_length']} tokens, ZeRO-{spec['deepspeed']['zero_stage']}"
    )


def _table(client: Client, job: dict[str, Any]) -> Table:
    metrics = client.get(f"/v1/jobs/{job['id']}/metrics", limit=10_000)
    points, evaluations = metrics["points"], metrics["evaluations"]
    checkpoint = client.get(f"/v1/jobs/{job['id']}/checkpoints")["data"][0]
    figures = job["figures"]
    state, full = figures["optimizer_state_bytes"], figures["full_adamw_state_bytes"]
    seconds = sum(point["seconds"] for point in points)
    memory = points[-1]["peak_device_bytes"] or points[-1]["peak_host_bytes"]
    table = Table(show_header=False)
    table.add_row("loss, first → last step", f"{points[0]['loss']:.3f} → {points[-1]['loss']:.3f}")
    table.add_row(
        "held-out perplexity, before → after",
        f"{evaluations[0]['perplexity']:.1f} → {evaluations[-1]['perplexity']:.2f}",
    )
    table.add_row("peak memory of the trainer", size(memory))
    table.add_row("optimizer state, against full AdamW", f"{size(state)} / {size(full)} = {state / full:.2f}")
    table.add_row("tokens per second", f"{points[-1]['tokens'] / seconds:,.0f}")
    table.add_row("checkpoint", f"step {checkpoint['step']}, {size(checkpoint['bytes'])}")
    return table


def _print_urls(console: Console, stack: Stack, job: dict[str, Any]) -> None:
    base = stack.api_url
    console.print(f"\ncheckpoints in {job['run_directory']}/checkpoints", soft_wrap=True)
    console.print("\nLook at:")
    for path, text in (
        (f"/v1/jobs/{job['id']}", "the job, every setting resolved"),
        (f"/v1/jobs/{job['id']}/metrics?thin_to=20", "its curves, thinned"),
        (f"/v1/jobs/{job['id']}/events", "what happened"),
        ("/metrics", "for Prometheus"),
        ("/docs", "the API's own documentation"),
    ):
        console.print(f"  {base}{path}", style="cyan", soft_wrap=True)
        console.print(f"      {text}")
