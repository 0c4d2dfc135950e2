"""python -m benchmarks.generation: what keeping the factors is worth when a model generates, full against factored.

Both are the same model with random values, as a merged and as a factored export would be loaded; what training has made
of them does not matter here. For speed both are in one process and take turns, generation by generation, so that a
machine that slows down slows both; figures are medians, and what matters are the ratios to the full model. The peak of
memory is that of a process with one of them alone, less what it held before it had a model.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.alone  # noqa: F401  (first: it sees to it that stdout is for results)
from trainer.config import TrainingSpec
from trainer.exports.loading import empty_factored
from trainer.model import DTYPES, in_order, structure
from trainer.presets import LLAMA_TARGETS, PRESETS, usual_rank
from trainer.tokenizer import load_tokenizer
from trainer.weights import Filler

FORMS = ("full", "factored")


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        print(_peak_bytes(arguments))
        return
    measured = [_measured(preset, arguments) for preset in arguments.models]
    host = platform.processor() or platform.machine()
    machine = {"device": arguments.device, "host": host, "threads": torch.get_num_threads(), "date": str(date.today())}
    if arguments.json:
        print(json.dumps({"machine": machine, "arguments": vars(arguments), "models": measured}, indent=1))
    else:
        _print(machine, arguments, measured)


def _measured(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    models = {form: _model(preset, form, arguments) for form in FORMS}
    batches = dict.fromkeys([1, *arguments.batches])
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for repetition in range(arguments.repetitions + 1):
        print(f"[{repetition}/{arguments.repetitions}] {preset}", file=sys.stderr, flush=True)
        for batch in batches:
            for new in (1, 1 + arguments.tokens):
                for form, model in models.items():
                    taken = _generation_seconds(model, batch, new, arguments)
                    if repetition:  # the first one warms up
                        seconds.setdefault((form, batch, new), []).append(taken)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    found: dict[str, Any] = {"model": preset, "rank": arguments.rank or usual_rank(preset)}
    for form, model in models.items():
        first = {batch: medians[form, batch, 1] for batch in batches}
        rest = {batch: medians[form, batch, 1 + arguments.tokens] - first[batch] for batch in batches}
        found[form] = {
            "prefill_tokens_per_second": arguments.prompt / first[1],
            "decode_tokens_per_second": {batch: batch * arguments.tokens / rest[batch] for batch in arguments.batches},
            "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "peak_bytes": _peak_bytes_of_a_process(preset, form),
        }
    return found


def _model(preset: str, form: str, arguments: argparse.Namespace) -> Any:
    spec = TrainingSpec.model_validate(
        {
            "model": {"preset": preset, "vocabulary": arguments.vocabulary},
            "dataset": {"source": "python-stdlib", "sequence_length": arguments.prompt + arguments.tokens + 1},
            "method": "full",
            "optimisation": {"steps": 1, "dtype": arguments.dtype},
        }
    )
    model, _ = structure(spec, load_tokenizer(spec.tokenizer), values=False)
    if form == "factored":
        rank = min(arguments.rank or usual_rank(preset), PRESETS[preset].hidden)
        model = empty_factored(model.config, DTYPES[arguments.dtype], rank, 1.0, LLAMA_TARGETS)
    filler = Filler(model, _Normal())
    for module in in_order(model):
        filler.fill(module)
    return model.eval().to(arguments.device)


class _Normal:
    """Values for everything, as a `trainer.weights.Source`: neither large nor so small that arithmetic is slow."""

    def values(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        shapes = {key: module.get_parameter(key) for key in names}
        return {key: torch.empty(p.shape, dtype=p.dtype).normal_(std=0.02) for key, p in shapes.items()}


def _generation_seconds(model: Any, batch: int, new: int, arguments: argparse.Namespace) -> float:
    """Of `new` tokens after the prompt, greedily: the first of them is the prompt's own pass."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, arguments.vocabulary, (batch, arguments.prompt), generator=generator).to(arguments.device)
    asked = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    began = time.perf_counter()
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked).cpu()
    taken = time.perf_counter() - began
    assert made.shape == (batch, arguments.prompt + new)
    return taken


def _peak_bytes_of_a_process(preset: str, form: str) -> int:
    command = [sys.executable, "-m", "benchmarks.generation", *sys.argv[1:], "--models", preset, "--memory-of", form]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    return int(done.stdout.splitlines()[-1])


def _peak_bytes(arguments: argparse.Namespace) -> int:
    """Of building one model and generating with the largest batch, in this process, whose only model it is."""
    batch, new = max(arguments.batches), 1 + arguments.tokens
    # What is imported on the way belongs to no model.
    _generation_seconds(_model("llama-tiny", arguments.memory_of, arguments), 1, 2, arguments)
    before = _resident_bytes("VmRSS")
    _generation_seconds(_model(arguments.models[0], arguments.memory_of, arguments), batch, new, arguments)
    if arguments.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(which: str) -> int:
    """VmRSS: now; VmHWM: at most. Not getrusage, whose peak begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{which}:")[2].split()[0]) * 1024


def _print(machine: dict[str, Any], arguments: argparse.Namespace, measured: list[dict[str, Any]]) -> None:
    print(
        f"{machine['device']}, {machine['host']}, {machine['threads']} threads, {machine['date']}, {arguments.dtype};"
    )
    print(
        f"{arguments.vocabulary} embedding rows, prompts of {arguments.prompt} tokens, {arguments.tokens} generated\n"
    )
    print("| model, rank | what | full | factored | ratio |")
    print("|---|---|---|---|---|")
    for found in measured:
        full, factored = found["full"], found["factored"]

        def row(
            what: str, one: float, other: float, unit: str, label: str = f"{found['model']}, {found['rank']}"
        ) -> None:
            print(f"| {label} | {what} | {one:,.1f} {unit} | {other:,.1f} {unit} | {other / one:.2f} |")

        key = "prefill_tokens_per_second"
        row("prefill, batch 1", full[key], factored[key], "tokens/s")
        for batch, speed in full["decode_tokens_per_second"].items():
            row(f"decode, batch {batch}", speed, factored["decode_tokens_per_second"][batch], "tokens/s")
        row("parameters", full["parameter_bytes"] / 1e6, factored["parameter_bytes"] / 1e6, "MB")
        row("peak memory", full["peak_bytes"] / 1e6, factored["peak_bytes"] / 1e6, "MB")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        epilog="example: python -m benchmarks.generation --models llama-60m llama-350m --repetitions 5",
    )
    parser.add_argument("--models", nargs="+", default=["llama-60m"], choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--rank", type=int, help="of the factors; default: the papers' for the preset")
    parser.add_argument("--vocabulary", type=int, default=32000, help="embedding rows")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are generated after the first one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at once, when decoding")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--memory-of", choices=FORMS, help="print the peak of one model's memory, and nothing else")
    return parser.parse_args()


if __name__ == "__main__":
    main()
