"""A container as docker-compose.yml would have it, of an image that lies unpacked here, without an engine.

Its root file system is read-only, nothing in /tmp can be executed, there is no network, and its user has no
capabilities and can get none. Needs root, and Linux's own tools.
"""

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Processes and mounts end with the first process.
_NAMESPACES = ["unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
_ENTER = r"""
root=$1; shift
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$root/dev/shm"
while [ "$1" != -- ]; do mount --bind "$1" "$root/$2"; shift 2; done
shift
ip link set lo up
# As Compose's ulimits. Where root may not raise a limit, the capability that makes it void takes its place.
capabilities=-all
ulimit -l unlimited 2>/dev/null || capabilities=-all,+ipc_lock
exec chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs \
  --bounding-set=$capabilities --inh-caps=$capabilities --ambient-caps=$capabilities "$@"
"""


@dataclass(frozen=True)
class Image:
    root: Path
    # Docker's: Env, Entrypoint, Cmd, User, Healthcheck.
    configuration: dict[str, Any]

    def run(self, command: list[str], volumes: dict[str, Path], timeout: float, **environment: str) -> str:
        """What it prints. Raises CalledProcessError, with that, where it fails."""
        given = [*self.configuration["Env"], *(f"{name}={value}" for name, value in environment.items())]
        mounts = [str(word) for target, source in volumes.items() for word in (source, target.lstrip("/"))]
        inside = ["env", "--ignore-environment", *given, *self.configuration["Entrypoint"], *command]
        done = subprocess.run(
            [*_NAMESPACES, "sh", "-euc", _ENTER, "enter", str(self.root), *mounts, "--", *inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        done.check_returncode()
        return done.stdout

    def serve(self, command: list[str], check: list[str], volumes: dict[str, Path], **environment: str) -> str:
        """Start it, and end it as soon as its healthcheck says that it is well, within a minute."""
        [kind, *checking] = check
        assert kind == "CMD"
        script = f"""
            {shlex.join(command)} &
            for _ in $(seq 30); do {shlex.join(checking)} 2>/dev/null && exit; sleep 1; done
            {shlex.join(checking)}
        """
        return self.run(["sh", "-c", script], volumes, 120, **environment)


def configuration(inspected: str) -> dict[str, Any]:
    """Docker's, of what `buildah inspect` says of an image."""
    return dict(json.loads(inspected)["Docker"]["config"])
