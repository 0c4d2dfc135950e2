"""/v1/files: examples to train on, and the results of jobs. The protocol is OpenAI's; what is ours comes besides."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.answers import answer, documented
from api.auth import Reader, Writer
from api.deps import Given, Services
from api.fileviews import Deleted, FileView
from api.uploads import BadUpload, Form, announced, received
from api.views import ListView
from jobs import files, filestore, keys
from jobs.files import NewFile
from jobs.filestore import Incoming
from jobs.keys import Caller
from jobs.tables import StoredFile
from trainer.examples import BadExample, check_columns

router = APIRouter(prefix="/v1/files", tags=["files"], responses=documented(401, 403, 413, 429, 503))

_SHORTEST, _LONGEST = 3600, 30 * 24 * 3600
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "JSON lines (.jsonl), CSV or TSV with a header, or Parquet",
        },
        "purpose": {"type": "string", "enum": [files.UPLOADS]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": _SHORTEST, "maximum": _LONGEST},
        "columns": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": 'what a field is called in the file, where that is not its own name: {"prompt": "question"}',
        },
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


def _visible(given: Given, caller: Reader, file_id: str) -> StoredFile:
    return files.get(given.database, file_id, caller.sees)


# The file that a path names: somebody else's is not there.
VisibleFile = Annotated[StoredFile, Depends(_visible)]


@router.post("", response_model=FileView, responses=documented(400, 408), openapi_extra=_BODY)
async def upload_file(request: Request, given: Given, caller: Writer) -> Response:
    """Store a file of examples. It is `uploaded` until it has been examined, then `processed`, or `error`, with the
    lines that are wrong in `status_details`."""
    again = request.headers.get("x-stainless-retry-count", "0") != "0"
    if not again and (length := announced(request)):
        # Before it is sent: a form is no more than this larger than its file.
        # Of a repetition it may be there already.
        await run_in_threadpool(_check_quota, given, caller, length - 4096)
    incoming = await run_in_threadpool(Incoming, given.settings)
    try:
        async with received(request, given.settings, incoming) as form:
            stored = await run_in_threadpool(_store, given, _new(form, caller), incoming, again)
    except ClientDisconnect:
        return answer(400, "the client went away before all was sent", "invalid_request_error", code="invalid_body")
    return JSONResponse(FileView.of(stored).model_dump())


@router.get("", responses=documented(400))
def list_files(
    given: Given,
    caller: Reader,
    purpose: Annotated[str | None, Query(description="only those of this purpose")] = None,
    after: Annotated[str | None, Query(description="id of the last file of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="by the time they were made")] = "desc",
) -> ListView[FileView]:
    """The caller's, or everybody's for an administrator."""
    page = files.list_files(given.database, caller.sees, purpose, after, limit, order == "asc")
    found = [FileView.of(stored) for stored in page.items]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return ListView[FileView](data=found, has_more=page.has_more, first_id=first, last_id=last)


@router.get("/{file_id}", responses=documented(404))
def get_file(file: VisibleFile) -> FileView:
    """How it was found to be."""
    return FileView.of(file)


@router.delete("/{file_id}", responses=documented(404, 409))
def delete_file(given: Given, caller: Writer, file_id: str) -> Deleted:
    """Remove a file, unless a job that has not ended needs it."""
    files.remove(given.database, given.settings, file_id, caller.sees)
    return Deleted(id=file_id)


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=documented(404) | _BYTES)
def get_content(given: Given, file: VisibleFile) -> StreamingResponse:
    """Its bytes, as they were uploaded."""
    pieces = filestore.pieces(given.settings, file)
    # A store that is away is known at the first piece, while it can still be said.
    whole: Iterator[bytes] = chain([next(pieces, b"")], pieces)
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": "attachment",
        # Somebody's bytes are no page of ours.
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(whole, media_type="application/octet-stream", headers=headers)


def _check_quota(given: Services, caller: Caller, size: int) -> None:
    with given.database.transaction() as session:
        keys.check_storage(session, caller.owner, max(0, size))


def _store(given: Services, new: NewFile, incoming: Incoming, again: bool) -> StoredFile:
    if again and (earlier := files.sent_before(given.database, new, incoming)) is not None:
        return earlier
    stored = files.create(given.database, given.settings, new, incoming)
    return given.checker.after_upload(stored)


def _new(form: Form, caller: Caller) -> NewFile:
    assert form.filename is not None
    fields = dict(form.fields)
    purpose = fields.pop("purpose", None)
    if purpose != files.UPLOADS:
        given = "it is missing" if purpose is None else f"{ascii(purpose[:60])} is none that is taken here"
        raise BadUpload(f"purpose: {given}; choose among '{files.UPLOADS}'", "purpose")
    expires_after, columns = _expires_after(fields), _columns(fields)
    if fields:
        name = ascii(next(iter(fields))[:60]).strip("'")
        known = ", ".join(_FORM["properties"])
        raise BadUpload(f"{name}: there is no such field; those that there are: {known}", name)
    return NewFile(caller.owner, form.filename, purpose, expires_after=expires_after, columns=columns)


def _expires_after(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        name = "expires_after[anchor]"
        raise BadUpload(f"{name}: {anchor!r} is no time to count from; give 'created_at'", name)
    if seconds is None or not seconds.isascii() or not seconds.isdigit() or len(seconds) > 9:
        seconds = "0"
    if not _SHORTEST <= int(seconds) <= _LONGEST:
        name = "expires_after[seconds]"
        raise BadUpload(f"{name}: give a whole number from {_SHORTEST:,} to {_LONGEST:,}", name)
    return int(seconds)


def _columns(fields: dict[str, str]) -> Mapping[str, str]:
    """A JSON object, or a field for each, which is how the OpenAI client writes one in a form."""
    columns: Any = {}
    if "columns" in fields:
        try:
            columns = json.loads(fields.pop("columns"))
        except (ValueError, RecursionError) as error:
            raise BadUpload(f"columns: it is no JSON object: {error}", "columns") from error
    if isinstance(columns, dict):
        for name in [name for name in fields if name.startswith("columns[") and name.endswith("]")]:
            columns[name[len("columns[") : -1]] = fields.pop(name)
    if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
        raise BadUpload('columns: give a JSON object of names, such as {"prompt": "question"}', "columns")
    try:
        check_columns(columns)
    except BadExample as error:
        raise BadUpload(f"columns: {error}", "columns") from error
    return columns
