"""A multipart form with one file, taken as it comes in: the file's bytes go straight to where the store keeps what is
on its way, and no more than a piece of it is in memory.

FastAPI's own forms would write the whole body to /tmp first, behind the body's limit for every other route.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from jobs.filestore import PIECE, Incoming
from jobs.settings import Settings

# Of a form: many fields, or a long one, are no file to be trained on.
_MOST_FIELDS = 20
_MOST_FIELD_BYTES = 16 * 2**10
# What a form has besides its file.
_MOST_AROUND = 64 * 2**10
_SILENT_SECONDS = 60.0
# An upload that brings less than this, on average over the seconds that it is waited for, is ended.
_LEAST_RATE = 8 * 2**10  # bytes a second
_RATED_SECONDS = 60.0


class BadUpload(Exception):
    """`param` is the field to change."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_value") -> None:
        self.param, self.status, self.code = param, status, code
        super().__init__(message)


class TooSlow(BadUpload):
    def __init__(self, came: int, seconds: float) -> None:
        super().__init__(
            f"only {came:,} bytes came in {seconds:.0f} s, and less than {_LEAST_RATE:,} bytes a second is not waited "
            "for; send the file again, by a faster connection",
            status=408,
            code="timeout",
        )


class TooLarge(BadUpload):
    def __init__(self, most: int) -> None:
        message = f"file: it is larger than {most:,} bytes, the most that is taken here; split it into several"
        super().__init__(message, "file", 413, "too_large")


class Form:
    """Fed with the body's bytes: fields by name, and the file with its name, in `incoming`."""

    def __init__(self, boundary: bytes, incoming: Incoming, most: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._incoming, self._most, self._ended = incoming, most, False
        self._headers: list[tuple[bytearray, bytearray]] = []
        self._name, self._value = "", bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._all,
                },
            )
        except FormParserError as error:
            raise BadUpload(f"Content-Type: its boundary cannot be used: {error}") from error

    def feed(self, data: bytes) -> None:
        """Raises BadUpload, and StoreAway."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadUpload(f"the body is no multipart form: {error}", code="invalid_body") from error

    def finish(self) -> None:
        """Raises BadUpload where the form is not whole."""
        if not self._ended:
            raise BadUpload("the body ends before its multipart form does; send all of it", code="invalid_body")
        if self.filename is None:
            raise BadUpload("file: it is missing; send one as a part that is called file", "file", code="missing")
        if not self._incoming.bytes:
            raise BadUpload("file: it is empty; send one example at least", "file")

    def _begin(self) -> None:
        self._headers.clear()
        self._name, self._value = "", bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        # A piece of the body may end within a name.
        if not self._headers or self._headers[-1][1]:
            self._headers.append((bytearray(), bytearray()))
        self._headers[-1][0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers[-1][1].extend(data[start:end])

    def _headers_finished(self) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in self._headers}
        disposition, options = parse_options_header(headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise BadUpload("a part of the form has no Content-Disposition with a name", code="invalid_body")
        if headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise BadUpload("a part of the form has a Content-Transfer-Encoding; send its bytes as they are")
        self._name = _decoded(options[b"name"], "a field's name", None)
        if self._name in self.fields or (self._name == "file" and self.filename is not None):
            raise BadUpload(f"{self._shown}: it is given twice", self._shown)
        if len(self.fields) >= _MOST_FIELDS:
            raise BadUpload(f"the form has more than {_MOST_FIELDS} fields", code="invalid_body")
        if self._name != "file":
            self.fields[self._name] = ""
        elif b"filename" in options:
            self.filename = _filename(_decoded(options[b"filename"], "the file's name", "file"))
        else:
            raise BadUpload("file: it is a field without a filename; send it as a file", "file")

    @property
    def _shown(self) -> str:
        return self._name if len(self._name) <= 60 and self._name.isprintable() else ascii(self._name[:60])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            if self._incoming.bytes + end - start > self._most:
                raise TooLarge(self._most)
            self._incoming.write(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > _MOST_FIELD_BYTES:
            raise BadUpload(f"{self._shown}: it is longer than {_MOST_FIELD_BYTES:,} bytes", self._shown)

    def _end(self) -> None:
        if self._name != "file":
            self.fields[self._name] = _decoded(bytes(self._value), self._shown, self._shown)

    def _all(self) -> None:
        self._ended = True


@asynccontextmanager
async def received(request: Request, settings: Settings, incoming: Incoming) -> AsyncIterator[Form]:
    """The request's form, whole, its file in `incoming`, which is gone at the end unless somebody has taken it.

    Raises BadUpload, ClientDisconnect, and StoreAway.
    """
    try:
        form = Form(_boundary(request), incoming, settings.max_file_bytes)
        length = announced(request)
        if length is not None and length > settings.max_file_bytes + _MOST_AROUND:
            raise TooLarge(settings.max_file_bytes)
        # Parsing, hashing and writing would keep the other requests of this process waiting.
        async for piece in _pieces(request, settings.max_file_bytes + _MOST_AROUND):
            await run_in_threadpool(form.feed, piece)
        form.finish()
        yield form
    finally:
        # Here and now: what waits may be cancelled, and would leave the bytes.
        incoming.__exit__()


def announced(request: Request) -> int | None:
    length = request.headers.get("content-length", "")
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


async def _pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body, in pieces that are worth a thread's while. Raises what `_chunks` raises, and TooLarge."""
    chunks, gathered, size, more = _chunks(request), bytearray(), 0, True
    while more:
        chunk = await anext(chunks, b"")
        more = bool(chunk)
        gathered += chunk
        size += len(chunk)
        if size > most:
            raise TooLarge(most - _MOST_AROUND)
        if gathered and (len(gathered) >= PIECE or not more):
            yield bytes(gathered)
            gathered.clear()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ClientDisconnect, TooSlow, and BadUpload for a silent one.

    Only the time in which it is waited for counts: a client need not answer for what takes long on this side.
    """
    stream, waited, came = request.stream(), 0.0, 0
    while True:
        began = time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(stream, b""), _SILENT_SECONDS)
        except TimeoutError as error:
            message = f"nothing came for {_SILENT_SECONDS:g} s; send the file again"
            raise BadUpload(message, status=408, code="timeout") from error
        if not chunk:
            return
        waited, came = waited + time.monotonic() - began, came + len(chunk)
        if waited >= _RATED_SECONDS:
            if came < waited * _LEAST_RATE:
                raise TooSlow(came, waited)
            waited, came = 0.0, 0
        yield chunk


def _boundary(request: Request) -> bytes:
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given)
    if kind.lower() != b"multipart/form-data":
        raise BadUpload(
            f"Content-Type: {given[:100]!r} is no form; send multipart/form-data with the parts file and purpose",
            code="invalid_body",
        )
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise BadUpload(
            "Content-Type: multipart/form-data needs a boundary of 1 to 200 characters", code="invalid_body"
        )
    return boundary


def _decoded(value: bytes, what: str, param: str | None) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise BadUpload(f"{what} is not UTF-8", param) from error
    if "\0" in text:
        raise BadUpload(f"{what} has a NUL character", param)
    return text


def _filename(given: str) -> str:
    """As clients escape it; without directories, whichever system's."""
    name = unquote(given.replace("\\", "/").rpartition("/")[2]) if re.search("%(22|0[aAdD])", given) else given
    name = name.replace("\\", "/").rpartition("/")[2]
    if not name.strip(". ") or not name.isprintable() or len(name.encode()) > 255:
        raise BadUpload(
            f"file: {ascii(name[:60])} cannot be its name; give 1 to 255 bytes of printable characters", "file"
        )
    return name
