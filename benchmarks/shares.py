"""python -m benchmarks.shares: where the time of one training step goes on a processor, method by method.

torch's profiler around single steps, of which variants take one in turn; medians over the rounds. What a kernel takes
by itself is counted to one of these; all else, and waiting for other ranks, is the rest:

    products     of matrices; their FLOPs from the shapes that were multiplied
    attention    scores, softmax and values, forward and backward
    AdamW        the fused kernel
    copies       into other types and flat buffers, and zeros

`bound` is the ratio of a step to the first variant's if its products ran as many FLOPs a second as the first one's do,
and all else took what it takes: what better products alone can reach.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.steps import add_variants, with_ranks

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "AdamW": ("aten::_fused_adamw_",),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}


def main() -> None:
    arguments = _arguments()
    if arguments.ranks > 1 and "LOCAL_RANK" not in os.environ:
        raise SystemExit(with_ranks("benchmarks.shares", arguments.ranks))
    # After the arguments: torch and DeepSpeed take seconds.
    from benchmarks.machine import described

    found = _measured(arguments)
    if os.environ["RANK"] != "0":
        return
    result = described() | {"arguments": vars(arguments), "rows": rows_of(found)}
    print(json.dumps(result, indent=1) if arguments.json else markdown(result))


def _measured(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Of each variant its steps on this rank: {kind: seconds, …, "step": seconds, "flops": of the products}."""
    import torch
    import torch.distributed as dist

    from benchmarks.alone import alone
    from benchmarks.sidebyside import stepper_of
    from trainer.batch import Batch
    from trainer.train import distributed

    if torch.cuda.is_available():
        raise SystemExit("this counts a processor's time, and a GPU would be used; CUDA_VISIBLE_DEVICES= hides it")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.variants}
    with distributed() if "RANK" in os.environ else alone():
        steppers = {name: stepper_of(name, arguments) for name in arguments.variants}
        generator = torch.Generator().manual_seed(dist.get_rank())
        for index in range(arguments.rounds + 1):
            batch = Batch.of_tokens(torch.randint(257, (arguments.batch, arguments.length), generator=generator))
            for name, stepper in steppers.items():
                shares = _profiled(lambda stepper=stepper, batch=batch: stepper.step([batch]))
                if index > 0:  # the first warms up
                    found[name].append(shares)
            if dist.get_rank() == 0:
                print(f"[{index}/{arguments.rounds}]", file=sys.stderr, flush=True)
    return found


def _profiled(step: Any) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.sidebyside import timed

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        seconds = timed(step)
    return shares_of(profiler.events()) | {"step": seconds}


def shares_of(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of a profile's events by kind, and the products' FLOPs."""
    shares = dict.fromkeys(KINDS, 0.0) | {"flops": 0.0}
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if event.name.startswith(names)), None)
        if kind is not None:
            shares[kind] += event.self_cpu_time_total / 1e6
        if kind == "products":
            shares["flops"] += _flops(event.input_shapes)
    return shares


def _flops(shapes: list[list[int]]) -> float:
    """2·(rows of the product)·(its columns)·(what is summed over): the last two shapes of matrices are the factors."""
    left, right = [shape for shape in shapes if len(shape) >= 2][-2:]
    flops = 2.0 * right[-1]
    for side in left:
        flops *= side
    return flops


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = [
        {"variant": name} | {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        for name, steps in found.items()
    ]
    first = rows[0]
    for row in rows:
        row["rest"] = row["step"] - sum(row[kind] for kind in KINDS)
        products = first["products"] * row["flops"] / first["flops"]
        row["bound"] = (row["step"] - row["products"] + products) / first["step"]
    return rows


def markdown(result: dict[str, Any]) -> str:
    columns = [*KINDS, "rest", "step"]
    lines = [
        "| variant | products, GFLOP | " + " | ".join(f"{column}, ms" for column in columns) + " | ratio | bound |",
        "|---" * (len(columns) + 4) + "|",
    ]
    first = result["rows"][0]
    for row in result["rows"]:
        times = " | ".join(f"{row[column] * 1e3:.0f}" for column in columns)
        ratios = f"{row['step'] / first['step']:.3f} | {row['bound']:.3f}"
        lines.append(f"| {row['variant']} | {row['flops'] / 1e9:.0f} | {times} | {ratios} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shares",
        description=__doc__,
        epilog="example: python -m benchmarks.shares --variants full galore --rounds 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_variants(parser)
    parser.add_argument("--rounds", type=int, default=9, help="steps that are profiled, of each variant")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
