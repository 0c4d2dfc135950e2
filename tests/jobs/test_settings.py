"""Settings that cannot work together are refused by name, and a broker's certificate is looked at."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.queue import BROKER_ERRORS, Doorbell, verified
from jobs.settings import Settings


def test_a_lease_that_one_late_beat_ends_is_refused() -> None:
    with pytest.raises(ValidationError, match="STIEFEL_LEASE_SECONDS: 20 is below three times STIEFEL_BEAT_SECONDS"):
        Settings(lease_seconds=20, beat_seconds=10)
    assert Settings(lease_seconds=30, beat_seconds=10).lease_seconds == 30


def test_models_have_names_that_fit_into_others_and_kinds_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, names in (("", []), ('{"a/b": {"hub": "x/y"}, "c": {"path": "/c"}}', ["a/b", "c"])):
        monkeypatch.setenv("STIEFEL_MODELS", told)
        assert list(Settings().models) == names
    for wrong in ("{", '{"ft:a": {"hub": "x"}}', '{"a": {"path": "c"}}', '{"a": {"preset": "none"}}', '{"a": "x"}'):
        monkeypatch.setenv("STIEFEL_MODELS", wrong)
        with pytest.raises(ValidationError):
            Settings()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("redis://:p@h:6379/0", "redis://:p@h:6379/0"),
        ("rediss://:p@h:6379/0", "rediss://:p@h:6379/0?ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_ca_certs=/ca.pem", "rediss://h/0?ssl_ca_certs=/ca.pem&ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_cert_reqs=none", "rediss://h/0?ssl_cert_reqs=none"),
    ],
)
def test_with_tls_the_broker_s_certificate_is_checked_unless_it_is_said(given: str, asked: str) -> None:
    assert verified(given) == asked


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_whoever_has_another_certificate_is_not_told_the_password(tmp_path: Path) -> None:
    with impostor(tmp_path) as (address, heard):
        with pytest.raises(BROKER_ERRORS, match="CERTIFICATE_VERIFY_FAILED"):
            Doorbell(Settings(redis_url=f"rediss://:secret@{address}/0")).ring("q", "job-1")
        assert heard == []
    # That it would be told where nobody looks, and that this test would notice. Connections are kept by port.
    with impostor(tmp_path) as (address, heard):
        with pytest.raises(BROKER_ERRORS):
            Doorbell(Settings(redis_url=f"rediss://:secret@{address}/0?ssl_cert_reqs=none")).ring("q", "job-1")
        assert any(b"secret" in said for said in heard)


@contextmanager
def impostor(directory: Path) -> Iterator[tuple[str, list[bytes]]]:
    """A server with a certificate that nobody vouches for: its address, and what it is told."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=somebody", "-days", "1"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    heard: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        # To the end of the server, and of whoever hangs up.
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                with suppress(OSError), context.wrap_socket(client, server_side=True) as wrapped:
                    heard.append(wrapped.recv(1000))

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    yield f"127.0.0.1:{server.getsockname()[1]}", heard
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    listening.join()
