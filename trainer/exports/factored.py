"""A run whose targets are factors and nothing else, with the factors kept: W_eff = s·B A is never made.

    config.json, generation_config.json    of the plain model
    factored.safetensors                   NAME.B (m, r) and NAME.A (r, n) in NAME.weight's place; all else as it is
    factors.json                           {"format": 1, "rank": r, "scale": s, "targets": ["q_proj", …]}

No file is called model.safetensors: transformers' own loader would take the directory, miss the targets' weights, and
make up random ones. `trainer.exports.loading.load_factored` loads it.
"""

import json

import torch
from torch import Tensor

from trainer.errors import SpecError
from trainer.exports.destination import Destination
from trainer.exports.merged import write_configuration
from trainer.exports.shards import write_shards
from trainer.exports.trained import Trained
from trainer.methodconfig import LoroConfig, LowRankConfig
from trainer.modelconfig import starts_from_weights

FORMAT, FACTORS, STEM = 1, "factors.json", "factored"


def write_factored(trained: Trained, destination: Destination) -> None:
    """Raises SpecError where the targets are more than factors."""
    method = trained.spec.method
    if not isinstance(method, LoroConfig | LowRankConfig):
        raise SpecError(
            f"--format: the targets of a {method.name} run are no product of two factors, only those of loro and "
            "lowrank are; choose --format merged"
        )
    if starts_from_weights(trained.spec.model):
        raise SpecError(
            "--format: this run started from pretrained weights, which stay beside the factors, W + λ·B A; "
            "choose --format merged"
        )
    assert method.rank is not None
    tensors: dict[str, Tensor] = {}
    for key, tensor in trained.plain.items():
        layer = trained.layer_of(key)
        if layer is None:
            tensors[key] = destination.typed(tensor)
        else:
            for factor, shape in ("B", (layer.rows, method.rank)), ("A", (method.rank, layer.columns)):
                tensors[f"{layer.name}.{factor}"] = torch.empty(shape, dtype=destination.dtype, device="meta")
    write_configuration(trained, destination)
    write_shards(tensors, trained.stored.get, destination, STEM)
    scale = method.scale if isinstance(method, LoroConfig) else 1.0
    facts = {"format": FORMAT, "rank": method.rank, "scale": scale, "targets": trained.targets}
    (destination.directory / FACTORS).write_text(json.dumps(facts, indent=2) + "\n")
