"""What jobs may name besides themselves: directories to read from, places to write to, code that comes with a model.

The API refuses what lies outside at submission; the trainer, which gets the same rules from its worker, looks again
when it starts, since a link may have been changed meanwhile, and the API may not see the trainers' files at all.
"""

from collections.abc import Sequence

from jobs.errors import Forbidden
from jobs.settings import Settings
from trainer.access import Access, Outside, check, check_directory
from trainer.config import TrainingSpec


def of(settings: Settings, granted: Sequence[str] = ()) -> Access:
    """The installation's rules; `granted` are paths that one job may read besides: its own files, and its model."""
    default = "*" if settings.auth == "off" else ""
    readable = _listed(settings.readable or default, ":")
    return Access(
        readable=None if readable is None else (*readable, *granted),
        writable=_listed(settings.writable or default, None),
        trust_remote_code=settings.trust_remote_code,
    )


def refuse(settings: Settings, spec: TrainingSpec, granted: Sequence[str] = ()) -> None:
    """Raises Forbidden for the first thing that the spec names outside of the rules."""
    try:
        check(spec, of(settings, granted))
    except Outside as error:
        raise Forbidden(error.field, error.reason) from error


def refuse_directory(settings: Settings, field: str, path: str) -> None:
    """Likewise, for a directory that is to be read from, named by `field`."""
    try:
        check_directory(field, path, of(settings))
    except Outside as error:
        raise Forbidden(error.field, error.reason) from error


def _listed(text: str, separator: str | None) -> tuple[str, ...] | None:
    """None: anything."""
    return None if text == "*" else tuple(part for part in text.split(separator) if part)
