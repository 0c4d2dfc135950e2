"""python -m benchmarks.gpu: speed and memory of training on one CUDA device, preset by preset, method by method.

Each preset and variant has a process of its own, so that its peak of device memory is its own; what matters between
variants is still that nothing else used the device. Tokens are random, and nothing is read, evaluated or saved.

    step       median seconds of the timed steps; tokens/s has its share of a switch every --period steps
    MFU        FLOPs a second of the *plain* model at this speed, over the vendor's dense bf16 peak of the device: of a
               token, 6 for each parameter but the input embedding's, whose rows are only looked up, and
               12·layers·width·length for attention, its causal half not taken off. A method that multiplies by
               smaller matrices does less than this; its MFU compares speeds
    at rest    bytes of tensors between two steps, beside what trainer.memory counts
    peak       bytes of tensors at the worst moment since the process began, switches included, beside what
               trainer.footprint estimates without its assumptions on context and allocator
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import described
from benchmarks.steps import rows_of
from trainer.footprint import Way, footprint
from trainer.memory import model_of
from trainer.methodconfig import METHOD_CONFIGS
from trainer.presets import PRESETS, Shape
from trainer.process import leave

EXAMPLE = "example: python -m benchmarks.gpu --model llama-60m llama-350m --variants full galore loro --out gpu.json"
GIGA = 10**9
# Sequences in a step: some 10⁴ tokens, as many as leave the small models' steps bound by computing.
BATCHES = {"llama-60m": 64, "llama-130m": 64, "llama-350m": 32, "llama-1b": 16}
_SMALL_BATCH = 4
VARIANTS = ("full", "galore", "loro", "lora")
# Rounds before the timed ones: libraries choose kernels and get their workspaces, the allocator its blocks.
_WARM_UP = 2
# FLOP/s in bf16, dense, by the vendor's data sheets, and how torch names the device. A part of one (MIG) is not listed.
PEAKS = (
    (r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 312e12),
    (r"H100 80GB HBM3", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H200", 989e12),
    (r"H200 NVL", 835e12),
    (r"B200", 2250e12),
    (r"L40S", 362e12),
    (r"GeForce RTX 4090", 165e12),
)
# In a process of its own: whoever asks for the name may hold some of the device's memory from then on.
_ASK = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Trial:
    """What one process measures; names and units are those of the arguments of benchmarks.steps."""

    model: str
    variant: str
    vocabulary: int
    rank: int
    batch: int
    length: int
    dtype: str
    stage: int
    rounds: int
    switches: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def main() -> None:
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(measured(Trial(**arguments.one))))
        leave(0)  # nothing that libraries do on their way out shall spoil what was measured
    device = None if arguments.cpu else device_name()
    if device is None and not arguments.cpu:
        raise SystemExit("torch finds no CUDA device here; use a machine with one, or --cpu to try this program out")
    shown = {key: value for key, value in vars(arguments).items() if key not in ("one", "json", "out")}
    found: dict[str, Any] = {**described(device), "arguments": shown, "rows": []}
    try:
        for row in rows(arguments, device):
            found["rows"].append(row)
            if arguments.out:  # after every row: a time limit shall not cost those before it
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        text = f"{found['machine']}; {arguments.dtype}, ZeRO stage {arguments.stage}, one rank\n\n{markdown(found)}"
        print(json.dumps(found, indent=1) if arguments.json else text)


def rows(arguments: argparse.Namespace, device: str | None) -> Iterator[dict[str, Any]]:
    """One row after another, as soon as its process has ended. Raises SystemExit, after the last, where one failed."""
    trials, failed = trials_of(arguments), []
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if arguments.cpu else {})
    for index, trial in enumerate(trials, 1):
        print(f"[{index}/{len(trials)}] {trial.model} {trial.variant}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(asdict(trial))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode != 0:
            failed.append(f"{trial.model} {trial.variant}: its process ended with {done.returncode}; see above")
            continue
        # Libraries log to stdout too.
        found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        yield row_of(trial, found, device, arguments.period) | {"process_seconds": time.perf_counter() - began}
    if failed:
        raise SystemExit("\n".join(failed))


def trials_of(arguments: argparse.Namespace) -> list[Trial]:
    return [
        Trial(
            model=model,
            variant=variant,
            vocabulary=arguments.vocabulary,
            rank=arguments.rank or PRESETS[model].hidden // 4,
            batch=arguments.batch or BATCHES.get(model, _SMALL_BATCH),
            length=arguments.length,
            dtype=arguments.dtype,
            stage=arguments.stage,
            rounds=arguments.rounds,
            switches=arguments.switches,
        )
        for model in arguments.model
        for variant in arguments.variants
    ]


def row_of(trial: Trial, found: dict[str, Any], device: str | None, period: int) -> dict[str, Any]:
    """`found` by `measured`, with medians, rates and ratios; what there is no figure of is None."""
    shape = PRESETS[trial.model]
    seconds = {"steps": found.pop("steps", []), "switches": found.pop("switches", [])}
    row: dict[str, Any] = asdict(trial) | {"parameters": model_of(shape, trial.vocabulary).parameters}
    row |= dict.fromkeys(("step_seconds", "switch_seconds", "switch_share", "tokens_per_second", "mfu"))
    if seconds["steps"]:
        of_time = rows_of({trial.variant: seconds}, period, trial.tokens)[0]
        row |= {key: of_time[key] for key in row.keys() & of_time.keys()}
        peak = peak_flops(device) if trial.dtype == "bf16" else None
        flops = flops_of_token(shape, trial.vocabulary, trial.length)
        row["mfu"] = row["tokens_per_second"] * flops / peak if peak else None
    if not seconds["switches"]:
        row["switch_seconds"] = row["switch_share"] = None
    ratios = {
        "counted_to_rest": _ratio(found["counted_bytes"], found.get("rest_bytes")),
        "estimated_to_peak": _ratio(found["estimated_bytes"], found.get("peak_bytes")),
    }
    return row | found | ratios


def flops_of_token(shape: Shape, vocabulary: int, length: int) -> int:
    """Of forward and backward pass, without anything that is computed twice; see above."""
    multiplying = model_of(shape, vocabulary).parameters - vocabulary * shape.hidden
    return 6 * multiplying + 12 * shape.layers * shape.heads * shape.head_size * length


def peak_flops(device: str | None) -> float | None:
    """A second, in bf16; None of a device that is not listed."""
    name = (device or "").removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)


def _ratio(mine: int | None, its: int | None) -> float | None:
    return mine / its if mine and its else None


def device_name() -> str | None:
    asked = subprocess.run([sys.executable, "-c", _ASK], stdout=subprocess.PIPE, text=True, check=True)
    return asked.stdout.strip() or None


# --------------------------------------------------------------------------------------------------- in its own process


def measured(trial: Trial) -> dict[str, Any]:
    """What is predicted, and what is found or said instead of it."""
    # After the arguments: torch and DeepSpeed take seconds.
    from benchmarks.alone import alone

    with alone():
        return predicted(trial) | or_out_of_memory(partial(_figures, trial))


def predicted(trial: Trial) -> dict[str, int | None]:
    """Bytes, by trainer.memory and trainer.footprint, and the rank; None of bytes that other packages take."""
    from benchmarks.sidebyside import spec_of

    if trial.variant.startswith("package:"):
        return {"counted_bytes": None, "estimated_bytes": None}
    spec = spec_of(trial.variant, trial)
    assert spec.optimisation.others is not None
    way = Way(
        dtype=spec.optimisation.dtype,
        zero_stage=spec.deepspeed.zero_stage,
        activation_checkpointing=spec.optimisation.activation_checkpointing,
        micro_batch=trial.batch,
        sequence_length=trial.length,
        others=spec.optimisation.others,
    )
    found = footprint(spec.method, PRESETS[trial.model], trial.vocabulary, way)
    rank = getattr(spec.method, "rank", None)  # the variant's own, or the trial's
    return {"rank": rank, "counted_bytes": found.counted.device.total, "estimated_bytes": found.tensors}


def or_out_of_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, with "out_of_memory": None; or, where the device's memory did not do, what torch said."""
    try:
        return measure() | {"out_of_memory": None}
    except RuntimeError as error:
        # The allocator's own exception is one; CUDA and its libraries, which allocate beside it, only have words.
        said = str(error)
        if not re.search(r"CUDA.*out of memory|CU\w+_STATUS_ALLOC_FAILED", said):
            raise
        return {"out_of_memory": said.splitlines()[0]}


def _figures(trial: Trial) -> dict[str, Any]:
    """Seconds of each timed step and switch; bytes at rest, and at most while the model is built, switched, stepped."""
    import torch

    from benchmarks.sidebyside import stepper_of, timed
    from trainer.batch import Batch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stepper = stepper_of(trial.variant, trial)
    peaks = {"building": _restarted_peak(), "switch": 0, "step": 0}
    found: dict[str, list[float]] = {"steps": [], "switches": []}
    generator = torch.Generator().manual_seed(0)
    for index in range(-_WARM_UP, trial.rounds):
        tokens = torch.randint(257, (trial.batch, trial.length), generator=generator)
        batches = [Batch.of_tokens(tokens.to(device))]
        if index < trial.switches:
            seconds = stepper.switch_seconds(batches)
            peaks["switch"] = max(peaks["switch"], _restarted_peak())
            if seconds is not None and index >= 0:
                found["switches"].append(seconds)
        seconds = timed(partial(stepper.step, batches))
        peaks["step"] = max(peaks["step"], _restarted_peak())
        if index >= 0:
            found["steps"].append(seconds)
    if device.type == "cpu":
        return found | {"rest_bytes": None, "peak_bytes": None, "peaks": None}
    return found | {"rest_bytes": torch.cuda.memory_allocated(), "peak_bytes": max(peaks.values()), "peaks": peaks}


def _restarted_peak() -> int:
    """Bytes of the device's tensors at most since this was last asked, or since the process began; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


# --------------------------------------------------------------------------------------------------------------- print


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| preset | variant | rank | batch | step | tokens/s | MFU | switch | at rest | counted / at rest | peak "
        "| estimated / peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in result["rows"]])


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str, unit: str = "", of_unit: float = 1) -> str:
        return "–" if row[key] is None else f"{row[key] / of_unit:{form}}{unit}"

    first = [row["model"], row["variant"], shown("rank", ".0f"), f"{row['batch']} × {row['length']}"]
    if row["out_of_memory"] is not None:
        estimated = shown("estimated_bytes", ".2f", " GB", GIGA)
        return [*first, "out of memory", *["–"] * 5, "out of memory", f"estimated {estimated}"]
    return [
        *first,
        shown("step_seconds", ".1f", " ms", 1e-3),
        shown("tokens_per_second", ",.0f"),
        shown("mfu", ".1%"),
        shown("switch_seconds", ".3f", " s"),
        shown("rest_bytes", ".2f", " GB", GIGA),
        shown("counted_to_rest", ".2f"),
        shown("peak_bytes", ".2f", " GB", GIGA),
        shown("estimated_to_peak", ".2f"),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", choices=list(PRESETS), metavar="P", help=f"presets; default: {' '.join(BATCHES)}"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=_variant,
        default=list(VARIANTS),
        metavar="V",
        help=f"METHOD[:field=value,…] as in benchmarks.steps; default: {' '.join(VARIANTS)}",
    )
    parser.add_argument("--rank", type=_positive, help="where a variant names none; default: a quarter of the width")
    parser.add_argument("--vocabulary", type=_positive, default=32000, help="embedding rows")
    parser.add_argument(
        "--batch",
        type=_positive,
        help="sequences in a step; default: "
        + ", ".join(f"{batch} for {name}" for name, batch in BATCHES.items())
        + f", else {_SMALL_BATCH}",
    )
    parser.add_argument("--length", type=_positive, default=256, help="tokens in a sequence")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="ZeRO stage; bf16 needs 1 or more")
    parser.add_argument("--rounds", type=_positive, default=15, help="steps that are timed")
    parser.add_argument("--switches", type=_positive, default=3, help="switches that are timed")
    parser.add_argument("--period", type=_positive, default=200, help="τ, for the share of time that switches take")
    parser.add_argument("--cpu", action="store_true", help="to try this program out, on llama-tiny unless --model says")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too, after every row")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dtype == "bf16" and arguments.stage == 0:
        parser.error("--stage 0 does not run in bf16; use --stage 1, 2 or 3, or --dtype fp32")
    arguments.model = arguments.model or (["llama-tiny"] if arguments.cpu else list(BATCHES))
    return arguments


def _variant(text: str) -> str:
    """Refused here, not by the process of its own after the others have run."""
    method = text.partition(":")[0]
    if method != "package" and method not in METHOD_CONFIGS:
        raise argparse.ArgumentTypeError(
            f"{method!r} is no method; choose of {', '.join(METHOD_CONFIGS)}, or package:…"
        )
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


if __name__ == "__main__":
    main()
