"""stiefel webhooks: be told when jobs end."""

import time
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from cli.client import Client
from cli.options import LOCAL, Api, AsJson, console, print_json

app = typer.Typer(
    help="Have a URL of yours called when a job of yours ends.", no_args_is_help=True, rich_markup_mode=None
)
Webhook = Annotated[str, typer.Argument(metavar="WEBHOOK", help="its id, as `stiefel webhooks list` shows it")]
_PATH = "/v1/webhook_endpoints"


@app.command(epilog="example: stiefel webhooks create https://example.org/hooks --event fine_tuning.job.succeeded")
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="is sent a POST for each event")],
    event: Annotated[list[str] | None, typer.Option(help="only these; default: every end of every job")] = None,
    name: Annotated[str, typer.Option(help="to find it again")] = "webhook",
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Have a URL called. Shows the secret that verifies what it is sent: keep it, it is not shown again."""
    body = {"url": url, "name": name} | ({"event_types": event} if event else {})
    made = Client(api).post(_PATH, body)
    if as_json:
        print_json(made)
        return
    console.print(f"{made['id']} is told of {', '.join(made['event_types'])}", soft_wrap=True)
    console.print(f"its secret: {made['signing_secret']}", soft_wrap=True, highlight=False)


@app.command("list", epilog="example: stiefel webhooks list --json")
def list_webhooks(as_json: AsJson = False, api: Api = LOCAL) -> None:
    """Whom we call, newest first."""
    page = Client(api).get(_PATH, limit=100)
    if as_json:
        print_json(page)
        return
    table = Table(Column("id", no_wrap=True), "name", "url", "events", "status")
    for hook in page["data"]:
        table.add_row(
            hook["id"], escape(hook["name"]), escape(hook["url"]), ", ".join(hook["event_types"]), hook["status"]
        )
    console.print(table)


@app.command(epilog="example: stiefel webhooks delete we_0123456789abcdef01234567")
def delete(webhook: Webhook, api: Api = LOCAL) -> None:
    """Call it no more; what has not arrived yet does not."""
    Client(api).delete(f"{_PATH}/{webhook}")
    console.print(f"{webhook} is deleted")


@app.command(epilog="example: stiefel webhooks test we_0123456789abcdef01234567")
def test(
    webhook: Webhook,
    event: Annotated[str, typer.Option(help="of which type")] = "fine_tuning.job.succeeded",
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Send it a sample and show what it answers."""
    result = Client(api).post(f"{_PATH}/{webhook}/test", {"event_type": event})
    if as_json:
        print_json(result)
        return
    console.print(f"it answered {result['status_code']}")


@app.command(epilog="example: stiefel webhooks deliveries we_0123456789abcdef01234567")
def deliveries(
    webhook: Webhook,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """What it was sent in the last week, newest first, and what came of it."""
    page = Client(api).get(f"{_PATH}/{webhook}/deliveries", limit=limit)
    if as_json:
        print_json(page)
        return
    table = Table(Column("webhook-id", no_wrap=True), "event", "job", "state", "tries", "last answer", "next try")
    for one in page["data"]:
        again = one["next_try_at"]
        due = "" if again is None else f"in {max(0.0, again - time.time()):.0f} s"
        job, answer = one["job_id"] or "a test", escape(one["answer"] or "")
        table.add_row(one["id"], one["event_type"], job, one["state"], str(one["tries"]), answer, due)
    console.print(table)
