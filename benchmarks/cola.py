"""python -m benchmarks.cola DATA: CoLA by several methods, from cola-train.tsv and cola-dev.tsv in DATA.

The files are those that CoLA's authors publish. `--model` names a directory with a pretrained encoder: then every
method has its paper's settings (`trainer.defaults`), and the figures stand beside the published ones. Without it a
small RoBERTa is made, with random weights and a tokeniser of the training sentences. Acceptability is not learnt from
8,551 sentences alone: that compares methods with one another, and with nothing that is published.

"End" is after the last step, and chooses nothing. "Best" is the evaluation with the highest Matthews, of one every
tenth of the run: chosen on the very sentences that it is told of, as is usual with GLUE, whose test labels are secret.
"""

import argparse
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig

from benchmarks.machine import machine
from trainer import events
from trainer.classify.files import each_labelled
from trainer.config import TrainingSpec
from trainer.datasetconfig import LabelledDataset
from trainer.rundir import RunDir

METHODS = ("full", "galore", "golore", "loro", "lora")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def small_roberta(directory: Path, sentences: list[str]) -> Path:
    """Its configuration and tokeniser; weights are the seed's."""
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=4000, special_tokens=SPECIAL, show_progress=False)
    )
    bare.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    named = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=bare, **named).save_pretrained(directory)
    RobertaConfig(
        vocab_size=bare.get_vocab_size(),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=1,
    ).save_pretrained(directory)
    return directory


def spec_of(arguments: argparse.Namespace, model: dict[str, Any], method: str, seed: int) -> TrainingSpec:
    given: dict[str, Any] = {"steps": arguments.steps, "global_batch": 32, "seed": seed}
    settings: dict[str, Any] = {"name": method}
    if model.get("weights") == "random":
        # Tuned by nobody: one rate for all, scales of 1, so that what differs is the method.
        given |= {"learning_rate": 1e-3}
        settings |= {} if method == "full" else {"rank": 32}
        settings |= {"alpha": 1.0, "period": 100} if method in ("galore", "golore") else {}
        settings |= {"period": 100} if method == "loro" else {}
    return TrainingSpec.model_validate(
        {
            "task": "classify",
            "model": model,
            "dataset": {
                "source": "labelled",
                "glue": "cola",
                "files": [str(arguments.data / "cola-train.tsv")],
                "validation_files": [str(arguments.data / "cola-dev.tsv")],
                "sequence_length": 64,
            },
            "method": settings,
            "optimisation": given | ({"learning_rate": arguments.rate} if arguments.rate else {}),
            "checkpoints": {"every": arguments.steps},
            "resources": {"processes": 1},
        }
    )


def train(rundir: RunDir, spec: TrainingSpec) -> list[events.Event]:
    rundir.root.mkdir(parents=True)
    rundir.spec.write_text(spec.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(rundir.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout[-4000:])
    return list(events.read(rundir.events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a directory with cola-train.tsv and cola-dev.tsv")
    parser.add_argument(
        "--model", help="a directory with a pretrained encoder; default: a small one, from random weights"
    )
    parser.add_argument("--steps", type=int, default=800, help="of 32 sentences; 268 are an epoch")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--rate", type=float, help="η of all methods; default: each one's own")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    dataset = LabelledDataset(
        glue="cola",
        files=(str(arguments.data / "cola-train.tsv"),),
        validation_files=(str(arguments.data / "cola-dev.tsv"),),
    )
    print(f"{machine()}: {' '.join(['python -m benchmarks.cola', *sys.argv[1:]])}\n")
    with TemporaryDirectory() as directory:
        made = Path(directory) / "roberta"
        if arguments.model is None:
            small_roberta(made, [example.text for _, example in each_labelled(dataset, "files")])
        model = {"path": arguments.model} if arguments.model else {"path": str(made), "weights": "random"}
        held_out = [example.label for _, example in each_labelled(dataset, "validation_files")]
        majority = max(held_out.count(label) for label in set(held_out)) / len(held_out)
        print("| method, seed | η | end: Matthews | accuracy | loss | best: Matthews | accuracy | state | seconds |")
        print("|---|---|---|---|---|---|---|---|---|")
        print(f"| the majority's class | | 0.000 | {majority:.3f} | | | | | |")
        for method, seed in product(arguments.methods, arguments.seeds):
            spec = spec_of(arguments, model, method, seed)
            found = train(RunDir(Path(directory) / f"{method}-{seed}"), spec)
            print(f"| `{method}`, {seed} | {spec.optimisation.learning_rate:g} | {figures(found)} |", flush=True)


def figures(found: list[events.Event]) -> str:
    """The other cells of a row."""
    started = next(event for event in found if isinstance(event, events.Started))
    _untrained, *evaluated = [event for event in found if isinstance(event, events.Evaluated)]
    last, best = evaluated[-1], max(evaluated, key=lambda event: event.metrics["matthews"])
    seconds = sum(event.seconds for event in found if isinstance(event, events.Step))
    return (
        f"{last.metrics['matthews']:.3f} | {last.accuracy:.3f} | {last.loss:.3f} "
        f"| {best.metrics['matthews']:.3f} | {best.accuracy:.3f} "
        f"| {started.optimizer_state_bytes / 1e6:.1f} MB | {seconds:.0f}"
    )


if __name__ == "__main__":
    main()
