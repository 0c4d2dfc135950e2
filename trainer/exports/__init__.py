"""A run as files for others, from one of its checkpoints, in one process and without ever holding the whole model.

trained.py      a run's checkpoint: the model's structure, and its values one tensor after the other
destination.py  where an export goes: a directory that is there whole, or not at all
shards.py       tensors into safetensors files of limited size
merged.py       every method: a plain Hugging Face directory, W_eff in the place of every replaced layer
adapter.py      LoRA and DoRA: an adapter for peft, beside the model that it adapts
factored.py     lowrank, and LORO from random values: the factors as they are, which halve what inference has to read
loading.py      such factors as a model that is ready for `generate`
export.py       all of it by name, as the command has it
"""
