"""What cannot be combined, and why: the list at the end of docs/zero.md, from the refusals themselves."""

from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tests.distributed.case import spec
from tests.distributed.matrix import METHODS, every_case

NVME = {"zero_stage": 3, "nvme_path": "/fast"}
# Settings that the matrix leaves out, since they are refused whatever else is chosen, or but for some methods.
ELSEWHERE: list[dict[str, Any]] = [
    {"deepspeed": {"zero_stage": 0, "offload": "cpu"}},
    {"deepspeed": {"zero_stage": 2, "offload_parameters": "cpu"}},
    {"deepspeed": NVME | {"zero_stage": 2, "offload": "nvme"}},
    {"deepspeed": {"zero_stage": 3, "offload": "nvme"}},
    {"deepspeed": NVME | {"offload_parameters": "nvme", "persistence_threshold": 10**6}},
    {"deepspeed": NVME | {"offload_parameters": "nvme"}},
    {"optimisation": {"dtype": "fp32", "merge": "stochastic"}},
]


def refusals(directory: Path) -> list[str]:
    """A line for every reason, with the methods that it is told to where those are not all."""
    told = [(case.method, reason) for case, reason in every_case(directory)[1].items()]
    for method, changes in product(METHODS, ELSEWHERE):
        try:
            spec(directory, method=METHODS[method], **changes)
        except ValidationError as error:
            told.append((method, error.errors()[0]["msg"]))
    methods: dict[str, set[str]] = defaultdict(set)
    for method, reason in told:
        # A reason may begin with the method's name; one line is enough for all of them.
        name = METHODS[method]["name"]
        methods[f"the method{reason.removeprefix(name)}" if reason.startswith(name) else reason].add(method)
    lines = []
    for reason, names in sorted(methods.items()):
        which = "" if len(names) == len(METHODS) else f" ({'; '.join(sorted(names))})"
        lines.append(f"- {reason}{which}.")
    return lines
