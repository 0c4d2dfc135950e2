"""Two ranks that take themselves for hosts and meet with directories of their own; what each is told, by case.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.meeting DIRECTORY
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.case import spec
from trainer import agreement
from trainer.errors import SpecError
from trainer.prepare import prepare
from trainer.process import leave
from trainer.rundir import RunDir
from trainer.train import distributed


def meet(directory: Path, case: str) -> bool | str:
    second = dist.get_rank() == 1
    rundir = RunDir(directory / case / str(dist.get_rank()))
    rundir.root.mkdir(parents=True)
    if case != "checkpoints":
        shared = directory / case / "checkpoints"
        shared.mkdir(exist_ok=True)
        rundir.checkpoints.symlink_to(shared)
    rate = 0.02 if second and case == "spec" else 0.01
    wanted = spec(directory, optimisation={"learning_rate": rate})
    made_from = wanted
    if second and case == "data":  # as where a host's files have other contents under the same names
        other = spec(directory / "other")
        (directory / "other" / "text.txt").write_text("another text " * 1000)
        made_from = other
    assert prepare(made_from, rundir, 0, lambda _: None, lambda: False)
    try:
        return agreement.all_prepared(wanted, rundir, prepared=not (second and case == "stopped"))
    except SpecError as error:
        return str(error)


if __name__ == "__main__":
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    agreement._SECONDS_TO_APPEAR = 0.5
    directory = Path(sys.argv[1])
    with distributed():
        found: dict[str, list[Any]] = {}
        for case in ("same", "spec", "data", "checkpoints", "stopped"):
            found[case] = [None, None]
            dist.all_gather_object(found[case], meet(directory, case))
        if dist.get_rank() == 0:
            (directory / "answers.json").write_text(json.dumps(found))
    leave(0)
