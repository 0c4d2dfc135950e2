"""Where a run trains: hosts, and ranks on each. Imports no torch."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Of a run: what trainer.run's seeds of random numbers keep apart.
MOST_RANKS = 4096
LARGEST_BATCH = 2**20


class Resources(BaseModel):
    """hosts × processes ranks; docs/multi-node.md says how several hosts are started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processes: int = Field(default=1, ge=1, le=1024, description="ranks on one host: one per GPU, or CPU processes")
    device: Literal["any", "gpu", "cpu"] = Field(default="any", description="what the ranks run on; any: GPUs if seen")
    hosts: int = Field(default=1, ge=1, le=1024, description="hosts, each with that many ranks")
    min_hosts: int | None = Field(default=None, ge=1, description="the run goes on with so few hosts; default: hosts")

    @model_validator(mode="after")
    def _resolve(self) -> "Resources":
        object.__setattr__(self, "min_hosts", self.fewest_hosts)
        return self

    @property
    def fewest_hosts(self) -> int:
        return self.hosts if self.min_hosts is None else self.min_hosts

    @property
    def ranks(self) -> int:
        """Of the whole run, when all its hosts are there."""
        return self.hosts * self.processes

    @property
    def allowed_ranks(self) -> tuple[int, ...]:
        """Numbers of ranks that the run may train with: of every number of hosts from min_hosts to hosts."""
        return tuple(hosts * self.processes for hosts in range(self.fewest_hosts, self.hosts + 1))


def problem_of(resources: Resources, global_batch: int) -> tuple[str, str] | None:
    """(field, message) of what is wrong with hosts and ranks for this batch."""
    hosts, fewest, processes, ranks = resources.hosts, resources.fewest_hosts, resources.processes, resources.ranks
    if fewest > hosts:
        return "resources.min_hosts", f"min_hosts {fewest} is above hosts {hosts}; choose at most that"
    if ranks > MOST_RANKS:
        return "resources.hosts", f"hosts {hosts} × processes {processes} are {ranks} ranks; at most {MOST_RANKS}"
    for allowed in reversed(resources.allowed_ranks):
        if global_batch % allowed:
            here, multiple = allowed // processes, math.lcm(*resources.allowed_ranks)
            ways = [f"a multiple of {multiple}"] if multiple <= LARGEST_BATCH else []
            ways += [f"a min_hosts above {here}"] if here < hosts else []
            return "optimisation.global_batch", (
                f"global_batch {global_batch} does not divide by hosts {here} × processes {processes}; "
                f"choose {', or '.join(ways or [f'a multiple of {allowed}'])}"
            )
    return None
