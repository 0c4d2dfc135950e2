"""A POST to an address that a user has named, from inside of our network: with care.

A user must not reach by us what they cannot reach themselves. So the name is looked up once, every address that it
leads to is looked at, and the connection goes to one of those addresses and not to the name, which might lead elsewhere
a moment later. Nothing is followed, and nothing of an answer but its status is kept.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

Reach = Literal["off", "public", "any"]

_LONGEST_URL = 2048
# RFC 6052: an IPv4 address is its last 32 bits, wherever a translator stands.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# Names that lead to a machine or a network itself (RFC 6761, 6762, 8375, 9476, and what clusters use).
_INSIDE = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa", "svc", "alt")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotCalled(Exception):
    """Such a URL is not called; the message says why."""


class Unanswered(Exception):
    """No answer came; the message says why, and nothing of what is inside."""


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))


@dataclass(frozen=True)
class Outward:
    """`reach`: public addresses over TLS alone, or any. `seconds`: for all of a call."""

    reach: Reach
    seconds: float = 10.0
    look_up: Callable[[str, int], list[str]] = _look_up

    def check(self, url: str) -> SplitResult:
        """What can be said without asking anybody. Raises NotCalled."""
        parts = _parts(url)
        if self.reach == "off":
            raise NotCalled("this installation calls nobody (STIEFEL_WEBHOOKS=off); its operator can change that")
        if self.reach == "any":
            return parts
        if parts.scheme != "https":
            raise NotCalled("its scheme is http: only https is called (STIEFEL_WEBHOOKS=public)")
        host = (parts.hostname or "").rstrip(".")
        address = _literal(host)
        if address is not None:
            _check_public(address)
        elif "." not in host or host.rpartition(".")[2] in _INSIDE:
            raise NotCalled(f"{host!r} is a name of an inner network: only public ones are called")
        return parts

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The status of the answer. Raises NotCalled and Unanswered."""
        parts = self.check(url)
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        connection = _Connection(host, port, self.seconds, self._addresses(host, port), parts.scheme == "https")
        # Time limits of sockets are for each read: an answer of one byte a second would take for ever.
        deadline = threading.Timer(self.seconds, connection.abort)
        deadline.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, dict(headers))
            status = connection.getresponse().status
            if connection.aborted:  # in the middle of its headers: half an answer reads as a whole one
                raise TimeoutError
            return status
        except ssl.SSLCertVerificationError as error:
            raise Unanswered(f"its certificate is not accepted: {error.verify_message}") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise Unanswered(self._reason(connection, error)) from error
        finally:
            deadline.cancel()
            connection.close()

    def _addresses(self, host: str, port: int) -> list[str]:
        """Of the name, all of which may be called. Raises NotCalled and Unanswered."""
        try:
            found = self.look_up(host, port)
        except (OSError, UnicodeError) as error:
            raise Unanswered("its name cannot be looked up") from error
        if self.reach != "any":
            for address in found:
                _check_public(ipaddress.ip_address(address))
        return found

    def _reason(self, connection: "_Connection", error: Exception) -> str:
        if connection.aborted or isinstance(error, TimeoutError):
            return f"no answer within {self.seconds:g} s"
        if isinstance(error, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(error, ssl.SSLError):
            return f"TLS failed: {error.reason or 'no more is known'}"
        if isinstance(error, http.client.HTTPException):
            return "the answer was not HTTP"
        return "the connection failed"


_PORTS = {"http": 80, "https": 443}


class _Connection(http.client.HTTPConnection):
    """To one of `addresses`, as `host`. (Standard library: it follows nothing and reads no proxy's settings.)"""

    def __init__(self, host: str, port: int, seconds: float, addresses: list[str], encrypted: bool) -> None:
        super().__init__(host, port, timeout=seconds)
        self._addresses = addresses
        self._tls = ssl.create_default_context() if encrypted else None
        self.default_port = _PORTS["https" if encrypted else "http"]  # which a Host header leaves out
        self.aborted = False

    def connect(self) -> None:
        failure: OSError = OSError("no address")
        for address in self._addresses:
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError as error:
                failure = error
            if self.aborted:
                break
        else:
            raise failure
        if self.aborted:
            raise TimeoutError
        if self._tls is not None:
            # In two steps, so that `abort` finds the socket that the handshake uses.
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.do_handshake()

    def abort(self) -> None:
        """From another thread: whatever is waited for ends."""
        self.aborted = True
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it has ended by itself meanwhile
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # not TLS's own goodbye, which would wait


def _parts(url: str) -> SplitResult:
    if len(url) > _LONGEST_URL:
        raise NotCalled(f"it has {len(url):,} characters; {_LONGEST_URL:,} are the most")
    if not url.isascii() or not url.isprintable() or re.search(r"[\s\\]", url):
        raise NotCalled("it has characters that a URL has not; write names in punycode and others as %XX")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise NotCalled(f"it is no URL: {error}") from error
    if parts.scheme not in _PORTS:
        raise NotCalled(f"its scheme is {parts.scheme!r}; use https")
    if not host or port == 0:
        raise NotCalled("it names no host to call; write it as https://example.org/hooks")
    if parts.username is not None or parts.password is not None:
        raise NotCalled("it holds a user or a password; what it is sent is signed, which proves more")
    if parts.fragment:
        raise NotCalled("it has a fragment (#…), which is never sent")
    return parts


def _literal(host: str) -> Address | None:
    """An address that is written as one, also in the ways that only a resolver understands (127.1, 0x7f000001)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    if re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", host.rpartition(".")[2]):
        raise NotCalled(f"{host!r} is an address in an unusual form; write it as four numbers")
    return None


def _check_public(address: Address) -> None:
    """Raises NotCalled."""
    if not _is_public(address):
        # Not which: what a name leads to inside is nobody's business.
        raise NotCalled("it leads to an address that is not public; only public ones are called")


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address in _TRANSLATED:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved and not address.is_unspecified
