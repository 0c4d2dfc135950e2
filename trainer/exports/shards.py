"""Tensors into safetensors files of limited size, one file's tensors in memory at a time."""

import json
from collections.abc import Callable

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from trainer.exports.destination import Destination


def write_shards(
    tensors: dict[str, Tensor], value: Callable[[str], Tensor], destination: Destination, stem: str
) -> None:
    """`STEM.safetensors`, or several with an index, laid out and named as `save_pretrained` does.

    `tensors` may be on the meta device: they say the order, the shapes and the types. `value` is asked for each once.
    """
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=destination.shard_bytes
    )
    for file, keys in split.filename_to_tensors.items():
        whole = {key: value(key).to(tensors[key].dtype).contiguous() for key in keys}
        save_file(whole, destination.directory / file, metadata={"format": "pt"})
        # Before the next ones are made.
        del whole
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_parameters": parameters} | split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (destination.directory / f"{stem}.safetensors.index.json").write_text(text)
