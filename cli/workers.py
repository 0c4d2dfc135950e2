"""stiefel workers: who is there to take jobs, and taking one of them out of service."""

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.table import Table

from cli.client import Client
from cli.options import LOCAL, Api, AsJson, console, print_json
from cli.watch import size

app = typer.Typer(
    help="List workers; drain one before its machine goes away.", no_args_is_help=True, rich_markup_mode=None
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="as `stiefel workers list` shows it")]


@app.command("list", epilog="example: stiefel workers list --json")
def list_workers(as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Workers with what they have and what they do."""
    page = Client(api).get("/v1/workers")
    if as_json:
        print_json(page)
        return
    table = Table("name", "devices", "state", "job", "room", "version", "seen")
    for worker in page["data"]:
        state = f"{worker['state']}{', drained' if worker['drained'] else ''}"
        seen = f"{max(0.0, time.time() - worker['seen_at']):.0f} s ago"
        devices = f"{worker['devices']} {worker['device']}"
        room = "" if worker["storage_free_bytes"] is None else size(worker["storage_free_bytes"])
        name, job = escape(worker["name"]), worker["job_id"] or ""
        table.add_row(name, devices, state, job, room, worker["version"], seen)
    console.print(table)


@app.command(epilog="example: stiefel workers drain gpu-7:0,1 --stop-job")
def drain(
    name: Name,
    stop_job: Annotated[bool, typer.Option("--stop-job", help="its job checkpoints and goes elsewhere")] = False,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Give a worker no new job. What it trains goes on to its end, unless it is to stop."""
    _tell(Client(api).post(f"/v1/workers/{quote(name, safe='')}/drain?stop_job={str(stop_job).lower()}"), as_json)


@app.command(epilog="example: stiefel workers undrain gpu-7:0,1")
def undrain(name: Name, as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Give it jobs again."""
    _tell(Client(api).post(f"/v1/workers/{quote(name, safe='')}/undrain"), as_json)


def _tell(worker: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(worker)
        return
    console.print(
        f"{escape(worker['name'])} is {worker['state']}{' and takes no new job' if worker['drained'] else ''}"
    )
