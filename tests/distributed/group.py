"""Starting a group of ranks on a list of cases."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.process import free_port


def run_group(
    directory: Path, processes: int, cases: list[dict[str, Any]], module: str = "rank", timeout: float = 280
) -> Path:
    """Run `module` of this folder on the cases with `processes` ranks and wait; returns the file of the cases.

    Raises with the end of the output if a rank fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"cases-{processes}.json"
    file.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        "-m",
        f"tests.distributed.{module}",
        str(file),
    ]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return file
