"""What a guide tells people to type, held against the programs."""

from typing import Any

import typer

from cli.main import app


def check_stiefel(command: str) -> None:
    """That the stiefel command and every option of `command` exist."""
    found: Any = typer.main.get_command(app)
    words = command.split()[1:]
    while hasattr(found, "commands"):  # a group; typer's own class, not click's
        assert words[0] in found.commands, command
        found = found.commands[words.pop(0)]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, command
