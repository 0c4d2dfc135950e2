"""Calling addresses that users name: what is refused, what is really called, and for how long."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.outward import NotCalled, Outward, Unanswered
from tests.receiver import Receiver

INSIDE = [
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/",
    "https://10.0.0.1/", "https://172.16.3.4/", "https://192.168.1.1/", "https://169.254.169.254/latest/meta-data",
    "https://100.64.0.1/", "https://0.0.0.0/", "https://224.0.0.1/", "https://255.255.255.255/", "https://192.0.2.1/",
    "https://[::1]/", "https://[::]/", "https://[fe80::1]/", "https://[fc00::1]/", "https://[ff02::1]/",
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/", "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/", "https://[2001:db8::1]/", "https://localhost/", "https://LOCALHOST./", "https://db/",
    "https://a.svc.cluster.local/", "https://metadata.google.internal/", "https://x.localhost:8443/",
]  # fmt: skip
NO_URLS = [
    "", "x", "ftp://example.org/", "file:///etc/passwd", "https://", "https:///x", "https://user@example.org/",
    "https://a:b@example.org/", "https://example.org/#x", "https://example.org:0/", "https://example.org:99999/",
    "https://exa mple.org/", "https://example.org/\n", "https://exämple.org/", "https://example.org\\@127.0.0.1/",
    "https://[::1/", "javascript:alert(1)", f"https://example.org/{'x' * 2048}",
]  # fmt: skip


@pytest.mark.parametrize("url", INSIDE)
def test_what_lies_inside_is_refused_before_anybody_is_asked(url: str) -> None:
    with pytest.raises(NotCalled):
        Outward("public", look_up=_nobody).post(url, b"", {})


@pytest.mark.parametrize("url", NO_URLS)
@pytest.mark.parametrize("reach", ["public", "any"])
def test_what_is_no_url_is_refused_everywhere(url: str, reach: str) -> None:
    with pytest.raises(NotCalled):
        Outward("public" if reach == "public" else "any").check(url)


@pytest.mark.parametrize(
    "url", ["https://example.org", "https://example.org:8443/a/b?c=d%20e", "https://8.8.8.8/", "https://[2600::]/x"]
)
def test_what_is_public_may_be_called(url: str) -> None:
    Outward("public").check(url)


def test_without_tls_only_where_anything_may_be_called() -> None:
    with pytest.raises(NotCalled, match="only https"):
        Outward("public").check("http://example.org/")
    Outward("any").check("http://example.org/")


@pytest.mark.parametrize("inside", ["127.0.0.1", "10.0.0.1", "::1", "fe80::1%lo", "::ffff:10.0.0.1"])
def test_a_name_is_called_only_if_every_address_that_it_leads_to_is_public(inside: str) -> None:
    outward = Outward("public", look_up=lambda host, port: ["8.8.8.8", inside])
    with pytest.raises(NotCalled) as refused:
        outward.post("https://example.org/", b"", {})
    assert inside not in str(refused.value)


def test_a_name_is_looked_up_once_and_that_address_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers the second question with an address of our network gets no second question."""
    answers, called = [["9.9.9.9"], ["127.0.0.1"]], list[tuple[str, int]]()

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        called.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(Unanswered, match="refused"):
        Outward("public", look_up=lambda host, port: answers.pop(0)).post("https://rebinding.example/", b"", {})
    assert called == [("9.9.9.9", 443)]
    assert answers == [["127.0.0.1"]]


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would look the name up themselves."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with Receiver() as receiver:
        assert Outward("any").post(receiver.url, b"x", {}) == 200
        assert receiver.next().body == b"x"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_an_answer_that_drips_for_ever_ends_in_time(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                while not ended.wait(0.05):
                    try:
                        connection.sendall(said or b"H")
                    except OSError:
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        began = time.monotonic()
        with pytest.raises(Unanswered):
            Outward("any", seconds=0.5).post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"", {})
        assert time.monotonic() - began < 5
        ended.set()
        dripping.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    directory = tmp_path_factory.mktemp("tls")
    key, made = directory / "key.pem", directory / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=hooks.example"]
    command += ["-addext", "subjectAltName=DNS:hooks.example", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    yield key, made


def test_the_certificate_is_the_names_although_an_address_is_called(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, made = certificate
    here = Outward("any", look_up=lambda host, port: ["127.0.0.1"])
    with Receiver() as receiver:
        port = receiver.encrypt(made, key)
        with pytest.raises(Unanswered, match="certificate is not accepted"):
            here.post(f"https://hooks.example:{port}/", b"x", {})
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        ssl.create_default_context()
        assert here.post(f"https://hooks.example:{port}/", b"x", {}) == 200
        assert receiver.next().headers["host"] == f"hooks.example:{port}"
        with pytest.raises(Unanswered, match="certificate is not accepted"):
            here.post(f"https://other.example:{port}/", b"x", {})


def test_a_handshake_that_hangs_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(Unanswered, match="no answer within 0.3 s"):
            Outward("any", seconds=0.3).post(f"https://127.0.0.1:{server.getsockname()[1]}/", b"", {})
        assert time.monotonic() - began < 5


def _nobody(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} is looked up")
