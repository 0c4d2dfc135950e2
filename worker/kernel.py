"""What the kernel knows of memory: how often it has killed for lack of it."""

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def out_of_memory_kills(cgroups: Path = _CGROUPS) -> int:
    """Processes of this worker's control group that were killed for lack of memory; 0 where nobody counts them."""
    for file in (cgroups / "memory.events", cgroups / "memory" / "memory.oom_control"):
        if file.is_file():
            counts = dict(line.split() for line in file.read_text().splitlines() if len(line.split()) == 2)
            return int(counts.get("oom_kill", 0))
    return 0
