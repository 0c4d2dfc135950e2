"""The body of a submission from a file, flags and --set."""

import glob
import json
import sys
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "model": {"preset": "llama-1m"},
    "dataset": {"source": "python-stdlib"},
    "method": {"name": "galore", "rank": 32},
    "optimisation": {"steps": 100},
}


class BadFile(Exception):
    """A file or a setting that cannot be read."""


def body(file: Path | None, flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A file's contents, or the defaults; then the flags, then each `field.field=value`. Raises BadFile."""
    request = _read(file) if file is not None else json.loads(json.dumps(DEFAULTS))
    if flags.get("method.name") not in (None, "galore") and file is None:
        request["method"] = {}
    for field, value in flags.items():
        if value is not None:
            _put(request, field, _meaning(field, value))
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise BadFile(f"--set {setting!r} has no '='; write it as deepspeed.zero_stage=3")
        _put(request, field, _parse(text))
    return request


def _read(file: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
        request = json.loads(text)
    except (OSError, ValueError) as error:
        raise BadFile(f"{file}: {error}") from error
    if not isinstance(request, dict):
        raise BadFile(f"{file}: a job is a JSON object, not {type(request).__name__}")
    return request


def _meaning(field: str, value: Any) -> Any:
    """Model and dataset as a word, the way people type them."""
    if field == "model":
        if Path(value).is_dir():
            return {"path": str(Path(value).absolute())}
        return {"hub": value} if "/" in value else {"preset": value}
    if field == "dataset" and value != "python-stdlib":
        # Globs are expanded by the trainer; only the directory has to be made absolute here.
        files = [str(Path(value).absolute())]
        if not glob.glob(files[0], recursive=True):
            raise BadFile(f"--dataset: nothing matches {value!r}, and it is not python-stdlib")
        return {"source": "jsonl" if value.endswith(".jsonl") else "text", "files": files}
    return {"source": value} if field == "dataset" else value


def _put(request: dict[str, Any], field: str, value: Any) -> None:
    *path, last = field.split(".")
    target = request
    for part in path:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise BadFile(f"{field}: {part} is {inner!r} in the file, not an object with fields")
        target = inner
    target[last] = value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
