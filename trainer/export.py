"""A finished run as a Hugging Face model directory: merged weights, configuration, tokeniser."""

from pathlib import Path

from trainer.assemble import assemble
from trainer.checkpoint.place import place_of
from trainer.checkpoint.reading import newest
from trainer.config import TrainingSpec
from trainer.errors import CheckpointError
from trainer.methods import make_method
from trainer.rundir import RunDir
from trainer.tokenizer import load_tokenizer


def export(rundir: RunDir, out: Path) -> int:
    """Write the newest checkpoint's model to `out` and return its step. One process, on the CPU.

    What is loaded again by `AutoModelForCausalLM.from_pretrained(out)` is W_eff of every layer in a plain nn.Linear.
    Raises CheckpointError where the run has no complete checkpoint.
    """
    spec = TrainingSpec.model_validate_json(rundir.spec.read_text())
    found = newest(place_of(spec, rundir))
    if found is None:
        raise CheckpointError(f"{rundir.checkpoints} holds no complete checkpoint; let the run reach its first one")
    tokenizer = load_tokenizer(str(rundir.tokenizer))
    method = make_method(spec)
    model, _ = assemble(spec, tokenizer, method, found)
    method.load_state(found.method)
    for name, plain in method.plain_modules().items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return found.step
