"""The Dockerfile, read: stages, and the instructions in each."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == word]

    def last(self, word: str) -> str:
        return self.all(word)[-1]

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in rest.split())

    def packages(self) -> set[str]:
        """Of the distribution, that this stage installs."""
        found = re.findall(r"apt-get install --yes --no-install-recommends ([^&]+)", " ".join(self.all("RUN")))
        return {name for names in found for name in names.split()}


def arguments() -> dict[str, str]:
    """What stands before the first stage: arguments with their defaults."""
    return dict(rest.split("=", 1) for word, rest in _instructions() if word == "ARG" and "=" in rest)


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for word, rest in _instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(name, base)
        elif found:
            [*_, stage] = found.values()
            stage.instructions.append((word, rest))
    return found


def _instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for line in joined.splitlines() if line for word, _, rest in [line.partition(" ")]]
