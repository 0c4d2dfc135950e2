"""A plain Hugging Face directory, which transformers' `from_pretrained` loads: W_eff in every replaced layer."""

from collections.abc import Callable

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from trainer.exports.destination import Destination
from trainer.exports.shards import write_shards
from trainer.exports.trained import Trained
from trainer.finetune.chat import ends_of_answers


def write_merged(trained: Trained, destination: Destination) -> None:
    write_model(trained, trained.merged, destination)


def write_model(trained: Trained, value: Callable[[str], Tensor], destination: Destination) -> None:
    """The plain model, with `value` of each of its tensors: its files, its configuration, how it generates.

    One file's tensors and one layer are in memory at a time. Not so where transformers stores a model under other names
    or shapes than it computes with (experts, mostly), for only it knows how: then the whole model is.
    """
    tensors = {key: destination.typed(tensor) for key, tensor in trained.plain.items()}
    if get_model_conversion_mapping(trained.model, add_legacy=False):
        whole = {key: value(key).to(tensor.dtype) for key, tensor in tensors.items()}
        trained.model.save_pretrained(destination.directory, state_dict=whole, max_shard_size=destination.shard_bytes)
    else:
        write_shards(tensors, value, destination, "model")
    write_configuration(trained, destination)


def write_configuration(trained: Trained, destination: Destination) -> None:
    """config.json, as `save_pretrained` would write it for the plain model in the destination's type.

    And how it generates: a model that was fine-tuned ends with what it was taught to end with, whatever its base does.
    """
    model = trained.model
    model.config.dtype = str(destination.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(destination.directory)
    if model.can_generate():
        if trained.spec.task == "finetune":
            known = ends_of_answers(model.generation_config, trained.tokenizer)
            model.generation_config.eos_token_id = known[0] if len(known) == 1 else known or None
        model.generation_config.save_pretrained(destination.directory)
