"""stiefel files: examples to fine-tune on, uploaded, listed, read back, removed."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli.client import Client, Refused
from cli.options import LOCAL, Api, AsJson, console, print_json
from cli.watch import size

app = typer.Typer(
    help="Upload files of examples, and fetch the results of jobs.", no_args_is_help=True, rich_markup_mode=None
)
FileId = Annotated[str, typer.Argument(metavar="FILE", help="as `stiefel files list` shows it")]
# A store may take its time with a large file.
_SECONDS = 1800.0


@app.command(
    epilog='example: stiefel files upload train.csv --columns \'{"prompt": "question"}\' --expires-after 86400'
)
def upload(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="JSON lines, CSV, TSV or Parquet")],
    columns: Annotated[str | None, typer.Option(help="JSON: what fields are called in the file, if otherwise")] = None,
    expires_after: Annotated[int | None, typer.Option(help="seconds, 3600 to 2592000; default: never")] = None,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Upload examples and wait until they have been examined. Ends with 1 where something is wrong with them."""
    fields = {"purpose": "fine-tune"}
    if columns is not None:
        fields["columns"] = columns
    if expires_after is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after)}
    client = Client(api)
    try:
        with path.open("rb") as content:
            file = client.upload("/v1/files", fields, path.name, content, _SECONDS)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    deadline = time.monotonic() + _SECONDS
    while file["status"] == "uploaded" and time.monotonic() < deadline:
        time.sleep(0.5)
        file = client.get(f"/v1/files/{file['id']}")
    if as_json:
        print_json(file)
    else:
        console.print(f"{file['id']} is {file['status']}: {_told(file)}", soft_wrap=True, markup=False)
    if file["status"] != "processed":
        raise typer.Exit(1)


@app.command("list", epilog="example: stiefel files list --purpose fine-tune-results --json")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="fine-tune, or fine-tune-results")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    as_json: AsJson = False,
    api: Api = LOCAL,
) -> None:
    """Files, newest first."""
    page = Client(api).get("/v1/files", purpose=purpose, limit=limit)
    if as_json:
        print_json(page)
        return
    table = Table("id", "name", "purpose", "size", "status", "examples", "made")
    for file in page["data"]:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(file["created_at"]))
        examples = "" if file["examples"] is None else f"{file['examples']:,}"
        name, purpose = escape(file["filename"]), file["purpose"]
        table.add_row(file["id"], name, purpose, size(file["bytes"]), file["status"], examples, made)
    console.print(table)


@app.command(epilog="example: stiefel files content file-0123456789abcdef01234567 --out step_metrics.csv")
def content(
    file_id: FileId,
    out: Annotated[Path | None, typer.Option(help="a new file; default: standard output")] = None,
    api: Api = LOCAL,
) -> None:
    """Fetch a file's bytes."""
    pieces = Client(api).download(f"/v1/files/{file_id}/content", _SECONDS)
    if out is None:
        stdout = typer.get_binary_stream("stdout")
        for piece in pieces:
            stdout.write(piece)
        return
    try:
        with out.open("xb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise Refused(f"{out} cannot be written: {error.strerror}") from error


@app.command(epilog="example: stiefel files delete file-0123456789abcdef01234567")
def delete(file_id: FileId, api: Api = LOCAL) -> None:
    """Remove a file, unless a job that has not ended needs it."""
    Client(api).delete(f"/v1/files/{file_id}")
    console.print(f"{file_id} is deleted")


def _told(file: dict[str, Any]) -> str:
    if file["status"] == "error":
        return str(file["status_details"])
    shown = json.dumps(file["statistics"], ensure_ascii=False)
    return f"{file['examples']:,} examples ({file['format']}), {shown}" if file["examples"] else size(file["bytes"])
