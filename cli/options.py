"""What several commands have in common: their options, and how they print."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

Api = Annotated[
    str, typer.Option("--api", envvar="STIEFEL_API", help="where the API is; STIEFEL_API_KEY holds the key, if any")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
LOCAL = "http://127.0.0.1:8000"

console = Console()


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
