"""The API from the command line's side: a thin client that turns refusals into one sentence."""

import os
from collections.abc import Iterator
from typing import IO, Any

import httpx


class Refused(Exception):
    """The API answered with an error, or not at all; the message is for the user."""


class Unreachable(Refused):
    """Nobody answers; they may in a moment."""


class Client:
    """`key`: an API key, where the installation asks for one; by default that of STIEFEL_API_KEY."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        key = key or os.environ.get("STIEFEL_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, timeout=30, headers=headers)

    def get(self, path: str, **query: Any) -> Any:
        return self._answer("GET", path, params={k: v for k, v in query.items() if v is not None})

    def post(self, path: str, body: Any = None) -> Any:
        return self._answer("POST", path, json=body)

    def delete(self, path: str) -> None:
        self._answer("DELETE", path)

    def upload(self, path: str, fields: dict[str, str], name: str, content: IO[bytes], seconds: float) -> Any:
        """A form with a file, which is read as it goes."""
        return self._answer("POST", path, data=fields, files={"file": (name, content)}, timeout=seconds)

    def download(self, path: str, seconds: float) -> Iterator[bytes]:
        """The answer's bytes, as they come."""
        try:
            with self._http.stream("GET", path, timeout=seconds) as response:
                if response.is_error:
                    response.read()
                    self._body(response)
                yield from response.iter_bytes()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        return Unreachable(
            f"{self.url} does not answer ({error}); start the service with `stiefel up`, or set STIEFEL_API"
        )

    def _answer(self, method: str, path: str, **request: Any) -> Any:
        try:
            response = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return None if response.status_code == 204 else self._body(response)

    def _body(self, response: httpx.Response) -> Any:
        try:
            body = response.json()
        except ValueError:
            body = {"error": {"message": response.text[:500]}}
        if response.status_code in (502, 503, 504):
            raise Unreachable(str(body["error"]["message"]))
        if response.is_error:
            raise Refused(str(body["error"]["message"]))
        return body
