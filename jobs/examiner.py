"""What a file holds, found out here or by a process of its own (`python -m trainer examine`), its tokens counted.

A large file is examined by a process of its own: whatever it holds, it can neither keep other requests waiting nor take
this process's memory, nor end it.

The tokeniser that counts is the installation's (STIEFEL_FILES_TOKENIZER). `bytes` is counted without one; another is
loaded where examples are read, which is never this process: with it every file is examined by a process of its own.
"""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs.errors import StoreAway, TokenizerUnloadable
from jobs.settings import Settings
from jobs.tables import StoredFile
from trainer.bytecount import count_bytes
from trainer.errors import LEAVES, DataError
from trainer.examine import examine
from trainer.lengths import FileTokens
from trainer.records import kind_of

log = logging.getLogger("stiefel.files")

# Examined at once and here: it takes less time than starting a process. Not Parquet, which may unfold to anything.
_SMALL_BYTES = 128 * 2**10
_MOST_SECONDS = 1800
_MOST_MEMORY = 8 * 2**30
_MOST_START_SECONDS = 300
# Of the environment: what Python needs, and where the hub's client keeps what it has fetched; besides, for fetching.
_ALONE = re.compile(
    "PATH|PYTHONPATH|PYTHONDONTWRITEBYTECODE|LD_LIBRARY_PATH|LANG|LC_ALL|TMPDIR|HOME|XDG_CACHE_HOME|HF_HOME|HF_HUB_CACHE"
)
_FETCHING = re.compile(rf"{_ALONE.pattern}|HF_\w+|(?i:https?_proxy|all_proxy|no_proxy)|SSL_CERT_(FILE|DIR)")
_PROBE = {"messages": [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "A larch."}]}

_TOO_MUCH = (
    f"the file cannot be examined within {_MOST_MEMORY // 2**30} GiB of memory and {_MOST_SECONDS // 60} minutes; "
    "split it into smaller ones"
)
UNFORESEEN = (
    "examining the file has failed in a way that is not foreseen, and the service's log has the details: tell its "
    "operator, or upload the examples in another format"
)

Waiting = Callable[["subprocess.Popen[bytes]"], tuple[bytes, str]]


def is_quick(settings: Settings, stored: StoredFile, path: Path) -> bool:
    """Whether it is examined here."""
    small = stored.bytes <= _SMALL_BYTES and path.exists() and kind_of(path) != "parquet"
    return small and settings.files_tokenizer == "bytes"


def examined(settings: Settings, stored: StoredFile, path: Path, wait: Waiting) -> dict[str, Any]:
    """The report of trainer.examine; whatever the file does to who examines it, there is one.

    `wait` gives what a process has written, once it has ended. Raises StoreAway where the file cannot be read at the
    moment, and what `wait` raises.
    """
    if is_quick(settings, stored, path):
        return _here(stored, path)
    try:
        try:
            return _apart(settings.files_tokenizer, stored, path, wait)
        except _Ended as ended:
            if settings.files_tokenizer == "bytes":
                raise
            # It may be the tokeniser's fault: gone since the start, or too slow.
            log.error("%s: %s; its tokens are counted in bytes, not with STIEFEL_FILES_TOKENIZER", stored.id, ended)
            return _apart("bytes", stored, path, wait)
    except _Ended as ended:
        log.error("%s: %s", stored.id, ended)
        return refused(_TOO_MUCH if ended.of_limits else UNFORESEEN)


def refused(summary: str) -> dict[str, Any]:
    """The report of a file that nothing more is known of."""
    return {"fine": False, "summary": summary, "format": None, "examples": None, "statistics": {}}


def check_tokenizer(settings: Settings) -> None:
    """Count a small example with the installation's tokeniser, as files will be counted. Raises TokenizerUnloadable.

    One of the hub is fetched here, with whatever that needs. Files are counted from what the hub's client has kept:
    who reads a stranger's file has neither a network to ask nor a password to show.
    """
    tokenizer = settings.files_tokenizer
    if tokenizer == "bytes":
        return
    with TemporaryDirectory() as directory:
        path = Path(directory) / "probe.jsonl"
        path.write_text(json.dumps(_PROBE))
        command = _command(path, {}, tokenizer)
        try:
            _probe(command, _ALONE)
        except _Ended as ended:
            if Path(tokenizer).exists():
                raise TokenizerUnloadable(tokenizer, ended.told) from ended
            try:
                _probe(command, _FETCHING)
                _probe(command, _ALONE)
            except _Ended as again:
                raise TokenizerUnloadable(tokenizer, again.told) from again


class _Ended(Exception):
    """A process without a report."""

    def __init__(self, code: int, err: str) -> None:
        self.code, self.err = code, err
        super().__init__(f"its examination ended with {code}: {err[-500:]}")

    @property
    def of_limits(self) -> bool:
        return self.code < 0 or "MemoryError" in self.err

    @property
    def told(self) -> str:
        """The trainer's own words, behind what libraries say."""
        names = "|".join(leaf.name for leaf in LEAVES)
        return " ".join(re.split(rf"^(?:{names}): ", self.err, flags=re.MULTILINE)[-1].split())[-1000:].rstrip(".")


def _here(stored: StoredFile, path: Path) -> dict[str, Any]:
    try:
        return examine([path], columns=stored.columns, measures=[FileTokens("bytes", count_bytes)]).as_json()
    except OSError as error:
        raise StoreAway("read", str(error)) from error
    except Exception:
        # It would be the same again.
        log.exception("%s: its examination has failed", stored.id)
        return refused(UNFORESEEN)


def _apart(tokenizer: str, stored: StoredFile, path: Path, wait: Waiting) -> dict[str, Any]:
    """Raises _Ended, StoreAway, and what `wait` raises."""
    code, out, err = _run(_command(path, stored.columns, tokenizer), _ALONE, wait)
    try:
        report: dict[str, Any] = json.loads(out)
    except ValueError:
        if code == DataError.exit_code:  # the one reason for which it reads a file and has no report of it
            raise StoreAway("read", err[-500:]) from None
        raise _Ended(code, err) from None
    return report


def _probe(command: list[str], needed: re.Pattern[str]) -> None:
    def wait(process: "subprocess.Popen[bytes]") -> tuple[bytes, str]:
        try:
            out, err = process.communicate(timeout=_MOST_START_SECONDS)
        except subprocess.TimeoutExpired:
            raise _Ended(-1, f"it takes longer than {_MOST_START_SECONDS} s") from None
        return out, err.decode(errors="replace")

    code, _, err = _run(command, needed, wait)
    if code:
        raise _Ended(code, err)


def _command(path: Path, columns: Mapping[str, str], tokenizer: str) -> list[str]:
    examine = [sys.executable, "-m", "trainer", "examine", str(path), "--json"]
    return [*examine, "--columns", json.dumps(columns), f"--count={tokenizer}"]


def _run(command: list[str], inherited: re.Pattern[str], wait: Waiting) -> tuple[int, bytes, str]:
    """(exit status, output, errors). What parses a stranger's file knows no password of ours."""
    environment = {name: value for name, value in os.environ.items() if inherited.fullmatch(name)}
    if inherited is _ALONE:
        # Nor does it need the token that somebody has once logged in with.
        environment |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": os.devnull}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment) as process:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))
        try:
            out, err = wait(process)
        except BaseException:
            process.kill()
            raise
    return process.returncode, out, err
