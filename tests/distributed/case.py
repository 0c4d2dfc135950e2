"""What a group of ranks is asked to train, and what it answers; shared by the tests and by the ranks they start."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import TrainingSpec

TEXT = "".join(f"{n} times {m} is {n * m}, and {n} and {m} make {n + m}.\n" for n in range(30) for m in range(30))


def spec(directory: Path, **changes: Any) -> TrainingSpec:
    """A small run on a text that is written into `directory`.

    `changes` are merged one level deep, but for a model and a named method.
    """
    text = directory / "text.txt"
    if not text.exists():
        directory.mkdir(parents=True, exist_ok=True)
        text.write_text(TEXT)
    base: dict[str, Any] = {
        "model": {"preset": "llama-tiny"},
        "dataset": {"source": "text", "files": [str(text)], "sequence_length": 32, "validation_fraction": 0.01},
        "method": {"name": "galore", "rank": 12, "period": 3, "alpha": 0.5},
        "optimisation": {
            "steps": 8,
            "global_batch": 8,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            # With Adam's usual 1e-8 an entry whose gradient is rounding noise moves by a whole learning rate, in a
            # direction that depends on the order of summation: up to 2e-5 between three ranks and one.
            "epsilon": 1e-5,
        },
        "deepspeed": {"zero_stage": 2},
        "resources": {"processes": 2},
    }
    for key, value in changes.items():
        both = isinstance(base.get(key), dict) and isinstance(value, dict)
        # Another model or method is another thing, not a change of this one.
        other = key == "model" or (key == "method" and "name" in value)
        base[key] = base[key] | value if both and not other else value
    return TrainingSpec.model_validate(base)


def save_arrays(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    np.savez(path, **{name: value.numpy() for name, value in arrays.items()})


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
