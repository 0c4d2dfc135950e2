"""A real S3-compatible server (SeaweedFS, from its wheel), started by the tests and ended with them."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from trainer.process import free_port

_KEY, _SECRET = "stiefel-tests", "not-a-secret-outside-of-them"


class S3:
    """May be killed and started again on the same ports and files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "data").mkdir(parents=True)
        credentials = [{"accessKey": _KEY, "secretKey": _SECRET}]
        identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = {
            f"{part}.port{kind}": free_port() for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")
        }
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, by the names that every S3 client knows."""
        return {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._ports['s3.port']}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
        }

    def start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "weed"), "server", "-s3", "-filer", "-dir=data", "-s3.config=s3.json"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=100", "-master.volumeSizeLimitMB=64"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.telemetry=false"),
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._directory, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, (self._directory / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.environment['AWS_ENDPOINT_URL_S3']}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
