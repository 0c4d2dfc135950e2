"""Who is calling, and whether they may: API keys as bearer tokens, or this machine alone.

A route takes a `Reader`, a `Writer` or an `Admin`; what they get is a `jobs.keys.Caller` that has at least that scope.
"""

import ipaddress
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.deps import Given, Services
from jobs import keys
from jobs.keys import Caller, Scope


class Unauthenticated(Exception):
    """No API key, or none that is valid."""


class NotPermitted(Exception):
    """The caller is known and may not do this."""


_bearer = HTTPBearer(auto_error=False, bearerFormat="sk-stiefel-…", description="`stiefel keys create` makes one")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _with(scope: Scope) -> Callable[..., Caller]:
    def caller(request: Request, given: Given, credentials: _Credentials) -> Caller:
        if given.settings.auth == "off":
            _check_local(request)
            return keys.EVERYBODY
        found = _identified(request, given, credentials)
        if scope not in found.scopes:
            raise NotPermitted(
                f"this needs an API key with the scope {scope}; yours has {', '.join(sorted(found.scopes))}"
            )
        return found

    return caller


Reader = Annotated[Caller, Depends(_with(Scope.READ))]
Writer = Annotated[Caller, Depends(_with(Scope.WRITE))]
Admin = Annotated[Caller, Depends(_with(Scope.ADMIN))]


def scraper(request: Request, given: Given, credentials: _Credentials) -> Caller:
    """Whoever reads /metrics: anybody, where the installation says so."""
    if given.settings.auth == "on" and given.settings.open_metrics:
        return keys.EVERYBODY
    return _with(Scope.READ)(request, given, credentials)


Scraper = Annotated[Caller, Depends(scraper)]


def _identified(request: Request, given: Services, credentials: HTTPAuthorizationCredentials | None) -> Caller:
    address = request.client.host if request.client else "unknown"
    if credentials is None:
        raise Unauthenticated("no API key: send one as `Authorization: Bearer sk-stiefel-…`")
    # First, so that one who guesses does not shut out others behind the same address: a right key is never guessed.
    found = keys.identify(given.database, credentials.credentials)
    if found is None:
        given.rates.count_wrong_key(address)
        raise Unauthenticated("this API key is unknown or revoked; `stiefel keys create` makes one")
    given.rates.count_request(found.owner)
    return found


def _check_local(request: Request) -> None:
    """Without API keys only this machine is answered, and nobody for whom this machine merely passes on.

    The name that was asked for counts too: a page of the web must not reach us by a name of its own that it lets lead
    to 127.0.0.1.
    """
    server = request.scope.get("server")
    ends = (server[0] if server else "", request.client.host if request.client else "")
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    # A page of the web may send a request here, though it cannot read the answer; its browser says whose page it is.
    origin = request.headers.get("origin")
    foreign = (origin is not None and not _is_loopback(urlsplit(origin).hostname or "")) or (
        request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    )
    if forwarded or foreign or not all(_is_loopback(end) for end in (*ends, request.url.hostname or "")):
        raise NotPermitted(
            "without API keys (STIEFEL_AUTH=off) only this machine is answered, asked as localhost or 127.0.0.1; "
            "set STIEFEL_AUTH=on and make a key with `stiefel keys create`"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
