"""stiefel keys: make, list and revoke API keys. Needs the database itself, not the API: whoever has it is in charge."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError

from cli.options import AsJson, console, print_json
from jobs import keys
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.settings import Settings
from jobs.tables import ApiKey


class NoDatabase(Exception):
    """There is none, or not one of this version; the message is for the user."""


app = typer.Typer(
    help="Make, list and revoke API keys, in the database of STIEFEL_DATABASE_URL (or of STIEFEL_HOME).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Queued = Annotated[int | None, typer.Option(min=0, help="most jobs queued or paused at a time")]
Running = Annotated[int | None, typer.Option(min=0, help="most jobs running at a time")]
DeviceHours = Annotated[float | None, typer.Option(min=0, help="devices × hours, in all")]
Storage = Annotated[int | None, typer.Option(min=0, help="bytes of run directories and files, in all")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="as `stiefel keys list` shows it")]


@app.command(epilog="example: stiefel keys create --name team-a --scope write --running 2 --device-hours 500")
def create(
    name: Annotated[str, typer.Option(help="whose it is")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="read: look; write (default): submit, cancel, delete too; admin: all jobs, workers"),
    ] = None,
    queued: Queued = None,
    running: Running = None,
    device_hours: DeviceHours = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once."""
    with _database() as database:
        key, secret = keys.create(
            database, name, scope or [Scope.WRITE], Quotas(queued, running, device_hours, storage)
        )
    if as_json:
        print_json(_described(key) | {"key": secret})
        return
    console.print(f"key {key.id} for {escape(name)}; this is shown once:\n{secret}", soft_wrap=True, highlight=False)


@app.command("list", epilog="example: stiefel keys list --json")
def list_keys(as_json: AsJson = False) -> None:
    """Keys with their scopes, quotas and use; never the keys themselves."""
    with _database() as database:
        found = keys.list_keys(database)
    if as_json:
        print_json([_described(key) for key in found])
        return
    table = Table("id", "name", "scopes", "device hours", "last used", "state")
    for key in found:
        limit = "" if key.max_device_hours is None else f" of {key.max_device_hours:g}"
        hours = f"{key.device_seconds / 3600:.2f}{limit}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.last_used_at)) if key.last_used_at else "never"
        state = "revoked" if key.revoked_at else "valid"
        table.add_row(key.id, escape(key.name), ", ".join(key.scopes), hours, used, state)
    console.print(table)


@app.command("set", epilog="example: stiefel keys set 0123456789ab --device-hours 1000")
def set_quotas(
    key_id: KeyId,
    queued: Queued = None,
    running: Running = None,
    device_hours: DeviceHours = None,
    storage: Storage = None,
) -> None:
    """Change what a key may use; what is not named stays as it is."""
    with _database() as database:
        keys.set_quotas(database, key_id, Quotas(queued, running, device_hours, storage))
    console.print(f"key {key_id} has new quotas")


@app.command(epilog="example: stiefel keys revoke 0123456789ab")
def revoke(key_id: KeyId) -> None:
    """Refuse a key from now on. Its jobs go on; an administrator can cancel them."""
    with _database() as database:
        keys.revoke(database, key_id)
    console.print(f"key {key_id} is revoked")


@contextmanager
def _database() -> Iterator[Database]:
    """Raises NoDatabase."""
    url = Settings().url
    where = make_url(url)
    hint = "set STIEFEL_DATABASE_URL, or STIEFEL_HOME to where `stiefel up` runs"
    if where.get_backend_name() == "sqlite" and not Path(where.database or "").is_file():
        raise NoDatabase(f"there is no database {where.database}; {hint}")
    database = Database(url)
    try:
        yield database
    except (OperationalError, ProgrammingError) as error:
        shown = where.render_as_string(hide_password=True)
        raise NoDatabase(f"{shown} cannot be used: {error.orig}; run `python -m migrations`, or {hint}") from error
    finally:
        database.close()


def _described(key: ApiKey) -> dict[str, Any]:
    hidden = {"secret_hash"}
    return {column.name: getattr(key, column.name) for column in ApiKey.__table__.columns if column.name not in hidden}
