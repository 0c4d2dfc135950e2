"""stiefel: run the service on this machine, submit jobs, follow them, end them."""

import json
import logging
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cli import files, keys, webhooks, workers
from cli import submit as submission
from cli.broker import NoBroker
from cli.client import Client, Refused
from cli.demo import broker_name
from cli.demo import demo as run_demo
from cli.options import LOCAL, Api, AsJson, console, print_json
from cli.stack import Stack, StackError
from cli.watch import describe, watch_json
from cli.watch import watch as draw
from jobs.errors import JobsError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

app.add_typer(files.app, name="files")
app.add_typer(keys.app, name="keys")
app.add_typer(workers.app, name="workers")
app.add_typer(webhooks.app, name="webhooks")
JobId = Annotated[str, typer.Argument(metavar="JOB", help="a job's id")]


@app.command(epilog="example: stiefel up --home /var/lib/stiefel --port 8000 --workers 1")
def up(
    home: Annotated[Path, typer.Option(help="database, run directories, logs")] = Path(".stiefel"),
    port: Annotated[int, typer.Option(help="of the API; 0 takes a free one")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="jobs that run at a time")] = 1,
    generator: Annotated[bool, typer.Option(help="for trying models out: POST /v1/chat/completions")] = True,
) -> None:
    """Run broker, API, reaper, workers and a generator on this machine until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with Stack(home, port, workers, generator=generator) as stack:
        console.print(f"[bold]Stiefel[/] is up at {stack.api_url} ({broker_name(stack)}); logs in {stack.home}/logs")
        console.print(
            f"  try: stiefel submit --model llama-1m --method galore --steps 100 --watch --api {stack.api_url}"
        )
        console.print("  Ctrl-C ends it; a running job checkpoints first and goes on at the next start.")
        try:
            while True:
                time.sleep(1)
                for name in stack.revive():
                    console.print(f"[yellow]{name} had ended; it is started again (see its log)")
        except KeyboardInterrupt:
            console.print("\nending: trainers checkpoint, then everything stops")


@app.command(epilog="example: stiefel demo --port 0")
def demo(
    home: Annotated[Path, typer.Option(help="database, run directories, logs")] = Path(".stiefel/demo"),
    port: Annotated[int, typer.Option(help="of the API; 0 takes a free one")] = 0,
) -> None:
    """Start a stack, train a small LLaMA with GaLore on Python's own source, and show what came out."""
    run_demo(home, port, console)


@app.command(
    epilog="examples: stiefel submit job.json --watch; stiefel submit --model llama-9m --method galore "
    "--rank 64 --period 100 --steps 500 --set optimisation.dtype=bf16"
)
def submit(
    file: Annotated[Path | None, typer.Argument(help="a JSON file as POST /v1/jobs takes it; - for stdin")] = None,
    model: Annotated[str | None, typer.Option(help="a preset, a directory, or a hub id")] = None,
    dataset: Annotated[str | None, typer.Option(help="python-stdlib, or files: *.jsonl, else plain text")] = None,
    method: Annotated[str | None, typer.Option(help="as `stiefel methods` lists them")] = None,
    rank: Annotated[int | None, typer.Option(help="r")] = None,
    period: Annotated[int | None, typer.Option(help="τ, steps between two subspaces")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    name: Annotated[str | None, typer.Option(help="to find the job again")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="any field, as in deepspeed.zero_stage=3")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="follow it to its end")] = False,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Submit a training job."""
    flags = {"model": model, "dataset": dataset, "method.name": method, "method.rank": rank, "name": name}
    flags |= {"method.period": period, "optimisation.steps": steps}
    body = submission.body(file, flags, settings or [])
    client = Client(api)
    job = client.post("/v1/jobs", body)
    if not as_json:
        console.print(f"{job['id']} is {job['state']}; follow it with: stiefel watch {job['id']}", soft_wrap=True)
    elif not watch:
        print_json(job)
    if watch:
        _follow(client, job["id"], as_json)


@app.command(epilog="example: stiefel watch job-0123456789abcdef0123")
def watch(job: JobId, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Follow a job to its end: step, loss, tokens/s, memory, time left. Ends with 1 if the job failed."""
    _follow(Client(api), job, as_json)


@app.command("jobs", epilog="example: stiefel jobs --state running --json")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, paused, succeeded, failed, cancelled")] = None,
    method: Annotated[str | None, typer.Option(help="only this method's")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """List jobs, newest first."""
    page = Client(api).get("/v1/jobs", state=state, method=method, limit=limit)
    if as_json:
        print_json(page)
        return
    # An id is there to be copied.
    table = Table(Column("id", no_wrap=True, min_width=24), "name", "method", "state", "progress")
    for job in page["data"]:
        table.add_row(job["id"], escape(job["name"] or ""), job["method"], job["state"], describe(job))
    console.print(table)


@app.command(epilog="example: stiefel show job-0123456789abcdef0123 --json")
def show(job: JobId, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """One job: state, progress, latest figures, attempts, every setting."""
    found = Client(api).get(f"/v1/jobs/{job}")
    if as_json:
        print_json(found)
        return
    console.print(f"[bold]{found['id']}[/] {escape(found['name'] or '')}  {found['state']}  {describe(found)}")
    for attempt in found["attempts"]:
        why = f": {attempt['error']['code']}" if attempt["error"] else ""
        again = ", is tried again" if attempt["retry_at"] else ""
        said = f"{attempt['outcome'] or 'running'}{why}{again}"
        console.print(f"  attempt {attempt['number']} on {attempt['worker']}: {said}", highlight=False)
    if found["scheduling"]:
        console.print(f"  waits: {escape(found['scheduling']['reason'])}", soft_wrap=True)
    if found["error"]:
        console.print(f"  [red]{found['error']['code']}[/]: {escape(found['error']['message'])}", soft_wrap=True)
    console.print_json(json.dumps({"figures": found["figures"], "spec": found["spec"]}))


@app.command(epilog="example: stiefel cancel job-0123456789abcdef0123")
def cancel(job: JobId, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """End a job for good; a running one writes a checkpoint first."""
    _ask(job, "cancel", as_json, api)


@app.command(epilog="example: stiefel pause job-0123456789abcdef0123")
def pause(job: JobId, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Stop a job at the next step, with a checkpoint; `stiefel resume` goes on from there."""
    _ask(job, "pause", as_json, api)


@app.command(epilog="example: stiefel resume job-0123456789abcdef0123")
def resume(job: JobId, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Put a paused job back into the queue."""
    _ask(job, "resume", as_json, api)


@app.command(epilog="example: stiefel delete job-0123456789abcdef0123")
def delete(job: JobId, api: Api = LOCAL) -> None:
    """Remove a job that has ended, with its curves, logs and checkpoints."""
    Client(api).delete(f"/v1/jobs/{job}")
    console.print(f"{job} is deleted")


@app.command(epilog="example: stiefel logs job-0123456789abcdef0123 --tail 2000")
def logs(job: JobId, tail: Annotated[int, typer.Option(help="bytes")] = 20_000, api: Api = LOCAL) -> None:
    """The end of a job's log."""
    typer.echo(Client(api).get(f"/v1/jobs/{job}/logs", tail=tail)["text"], nl=False)


@app.command(epilog="example: stiefel methods --json")
def methods(as_json: AsJson = False, api: Api = LOCAL) -> None:
    """What can be trained with, and each method's settings."""
    page = Client(api).get("/v1/methods")
    if as_json:
        print_json(page)
        return
    for method in page["data"]:
        console.print(f"[bold]{method['name']}[/]  {method['summary']}\n  {method['paper']}")
        for field, schema in method["json_schema"]["properties"].items():
            if field != "name":
                console.print(
                    f"    {field} = {schema.get('default')}  {schema.get('description', '')}", highlight=False
                )


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    job = watch_json(client, job_id) if as_json else draw(client, job_id, console)
    if job["state"] == "failed":
        raise Refused(f"{job_id} failed: {job['error']['code']}: {job['error']['message']}")


def _ask(job_id: str, operation: str, as_json: bool, api: str) -> None:
    job = Client(api).post(f"/v1/jobs/{job_id}/{operation}")
    if as_json:
        print_json(job)
        return
    waits = job["state"] == "running" and operation != "resume"
    console.print(f"{job_id} is {job['state']}{f'; it will {operation} at the next step' if waits else ''}")


def main() -> None:
    try:
        app()
    except (Refused, NoBroker, StackError, submission.BadFile, JobsError, keys.NoDatabase) as error:
        Console(stderr=True).print(f"[red]stiefel:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
