"""Uploads that come slowly, through a real socket to the real application."""

import json
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from api import uploads
from jobs.settings import Settings
from tests.api.forms import END, FILE, FORM, PURPOSE
from tests.api.protocol import served

BODY = PURPOSE + FILE + END


@pytest.fixture(autouse=True)
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second long."""
    monkeypatch.setattr(uploads, "_RATED_SECONDS", 0.5)


def begun(url: str, length: int) -> socket.socket:
    address = urlsplit(url)
    assert address.hostname is not None
    connection = socket.create_connection((address.hostname, address.port or 0), timeout=30)
    head = f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {length}\r\n"
    connection.sendall(f"{head}Content-Type: {FORM['content-type']}\r\nConnection: close\r\n\r\n".encode())
    return connection


def answered(connection: socket.socket) -> tuple[bytes, dict[str, Any]]:
    """Until the server closes it."""
    received = b""
    while piece := connection.recv(2**16):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), json.loads(body)


def incoming(settings: Settings) -> list[Path]:
    return list((settings.files / "incoming").glob("*"))


def test_an_upload_that_trickles_is_ended(open_settings: Settings) -> None:
    with served(open_settings) as service, closing(begun(service.url, 10_000_000)) as connection:
        connection.sendall(PURPOSE + FILE[:-10])
        connection.settimeout(0.02)
        began, came = time.monotonic(), b""
        while not came:
            assert time.monotonic() - began < 20, "it is waited for"
            connection.sendall(b"x")
            try:
                came = connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                continue
        connection.settimeout(30)
        head, body = answered(connection)
        assert head.startswith(b"http/1.1 408") and b"connection: close" in head
        error = body["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "timeout", None)
        assert "less than 8,192 bytes a second is not waited for; send the file again" in error["message"]
        # The client tries again by itself, as it does with every 408.
        assert b"x-should-retry" not in head
        assert incoming(open_settings) == []


def test_an_upload_that_is_slow_and_fast_enough_is_taken(
    open_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_LEAST_RATE", 10)
    with served(open_settings) as service, closing(begun(service.url, len(BODY))) as connection:
        for place in range(0, len(BODY), 10):
            connection.sendall(BODY[place : place + 10])
            time.sleep(0.05)
        head, body = answered(connection)
    assert head.startswith(b"http/1.1 200")
    assert body["status"] == "processed"


def test_what_takes_long_on_this_side_is_not_the_client_s(
    open_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = uploads.Form.feed

    def slowly(form: uploads.Form, data: bytes) -> None:
        time.sleep(0.7)
        feed(form, data)

    monkeypatch.setattr(uploads.Form, "feed", slowly)
    monkeypatch.setattr(uploads, "PIECE", len(BODY) // 2)
    with served(open_settings) as service, closing(begun(service.url, len(BODY))) as connection:
        connection.sendall(BODY)
        head, _ = answered(connection)
    assert head.startswith(b"http/1.1 200")
