"""python -m benchmarks.memory: the memory that papers publish beside what trainer.memory counts. Needs no torch.

With --method, instead: what one rank of the product holds for a preset, part by part.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.errors import SpecError
from trainer.memory import Convention, Elements, Matrix, Memory, Model, Published, memory, model_of, published, split
from trainer.methodconfig import METHOD_CONFIGS, MethodConfig
from trainer.presets import PRESETS

GIGA, MEGA = 10**9, 10**6
PAPERS_GIGA = 1_024 * MEGA  # GaRare's

# LORO's table 1, whose other rows are those of GaLore and SLTrain. Weights and moments in bf16, places in int64.
COLUMNS = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
LLAMA = {
    "full": ("0.35", "0.81", "2.21", "8.04"),
    "lowrank": ("0.24", "0.57", "1.11", "3.66"),
    "lora": ("0.36", "0.84", "1.85", "6.34"),
    "relora": ("0.36", "0.84", "1.85", "6.34"),
    "galore": ("0.28", "0.61", "1.59", "4.76"),
    "sltrain": ("0.26", "0.60", "1.24", "4.16"),
    "loro": ("0.24", "0.57", "1.11", "3.66"),
}
# The adapters' rows count embeddings, head and norms twice, as weights that are trained and as weights that are kept.
CONVENTIONS = {name: Convention(others=4) for name in ("lora", "relora")}

# GaRare's reviews.
GARARE = {"full": "7.85", "garare": "3.98"}
ROBERTA_RANKS = (2, 8, 16)
ROBERTA = {
    "full": ("748",),
    "garare": ("251", "255", "260"),
    "galore": ("251", "256", "263"),
    "lora": ("253", "265", "281"),
}
# Adapters and moments in fp32 beside weights and bases in bf16; all else is frozen.
ROBERTA_LOW_RANK = Convention(trained=4, moments=4, others_moments=0)

# Published entries that are no sum of rounded parts, and what they may be.
_BOTH_IN_GIB = "0.24 is 0.08 + 0.16, both parts in GiB"
_MOMENTS_IN_GIB = "0.36 is 0.20 + 0.16, the moments in GiB"
DIFFERS = {
    ("llama-60m", "lowrank"): _BOTH_IN_GIB,
    ("llama-60m", "loro"): _BOTH_IN_GIB,
    ("llama-60m", "lora"): _MOMENTS_IN_GIB,
    ("llama-60m", "relora"): _MOMENTS_IN_GIB,
    ("llama-350m", "galore"): "an error in print: the parts are 0.74 + 0.65",
}


@dataclass(frozen=True)
class Row:
    """One entry of a published table. `weights`, `states`: ours, in `unit`; `computed`: as the paper would print it."""

    model: str
    method: str
    unit: str
    weights: float
    states: float
    computed: str
    published: str
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.computed == self.published


_SETTINGS: TypeAdapter[MethodConfig] = TypeAdapter(MethodConfig)


def settings_of(name: str, **settings: Any) -> MethodConfig:
    """Typed settings from a method's name and its fields. Raises pydantic's ValidationError."""
    return _SETTINGS.validate_python(settings | {"name": name})


def roberta_base() -> Model:
    """RobertaModel with its pooler: 124.65 M. Targets are all linear modules of its layers."""
    d, ffn, layers = 768, 3072, 12
    return Model(
        matrices=(
            *(Matrix(name, d, d, layers) for name in ("query", "key", "value", "attention_output")),
            Matrix("intermediate", ffn, d, layers),
            Matrix("output", d, ffn, layers),
            Matrix("pooler", d, d),
            *(Matrix("embeddings", rows, d) for rows in (50265, 514, 1)),
        ),
        # Biases of six linear modules, weight and bias of two norms, a layer; then the embedding's norm and the pooler.
        vectors=layers * (5 * d + ffn + 4 * d) + 3 * d,
    )


ROBERTA_TARGETS = ("query", "key", "value", "attention_output", "intermediate", "output")


def published_tables() -> list[Row]:
    return [*_llama(), *_garare(), *_roberta()]


def _llama() -> list[Row]:
    return [
        _by_parts(preset, name, entries[column], GIGA, "GB")
        for column, preset in enumerate(COLUMNS)
        for name, entries in LLAMA.items()
    ]


def _garare() -> list[Row]:
    return [_by_parts("llama-1b", name, entry, PAPERS_GIGA, "1.024 GB") for name, entry in GARARE.items()]


def _by_parts(preset: str, name: str, entry: str, unit: int, unit_name: str) -> Row:
    """The papers round weights and states to 0.01 and print the sum: 8.04 = 2.68 + 5.36, not 8.03."""
    counted = split(settings_of(name).resolved(preset), model_of(PRESETS[preset], 32000))
    found = published(*counted, CONVENTIONS.get(name, Convention()))
    hundredths = round(100 * found.weights / unit) + round(100 * found.states / unit)
    note = DIFFERS.get((preset, name), "")
    return Row(
        preset, name, unit_name, found.weights / unit, found.states / unit, f"{hundredths / 100:.2f}", entry, note
    )


def _roberta() -> list[Row]:
    model, rows = roberta_base(), []
    for name, entries in ROBERTA.items():
        for rank, entry in zip(ROBERTA_RANKS, entries, strict=False):
            found = roberta_bytes(model, name, rank)
            label = name if name == "full" else f"{name} r {rank}"
            computed = f"{found.total / MEGA:.0f}"
            rows.append(Row("roberta-base", label, "MB", found.weights / MEGA, found.states / MEGA, computed, entry))
    return rows


def roberta_bytes(model: Model, name: str, rank: int) -> Published:
    if name == "full":
        return published(*split(settings_of(name), model), Convention())
    if name != "galore":
        return published(*split(settings_of(name, rank=rank, targets=ROBERTA_TARGETS), model), ROBERTA_LOW_RANK)
    # This paper's GaLore is always left, as its GaRare is: the same core, and a basis that is stored.
    targets, others = split(settings_of("garare", rank=rank, targets=ROBERTA_TARGETS), model)
    stored = Elements(basis=sum(rank * m.rows * m.count for m in model.matrices if m.name in ROBERTA_TARGETS))
    return published(targets + stored, others, ROBERTA_LOW_RANK)


# -------------------------------------------------------------------------------------------------------------- print


def main() -> None:
    arguments = _arguments()
    if arguments.method is None:
        rows = published_tables()
        if arguments.json:
            print(json.dumps([asdict(row) | {"agrees": row.agrees} for row in rows], indent=1))
        else:
            _print_tables(rows)
        return
    try:
        found = _breakdown(arguments)
    except (SpecError, ValidationError) as error:
        raise SystemExit(str(error)) from error
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "bytes": asdict(found)}, indent=1))
    else:
        _print_breakdown(found)


def _breakdown(arguments: argparse.Namespace) -> Memory:
    model = model_of(PRESETS[arguments.model], arguments.vocabulary, arguments.tied)
    return memory(
        settings_of(arguments.method, **dict(arguments.set)).resolved(arguments.model),
        replace(model, pretrained=arguments.pretrained),
        dtype=arguments.dtype,
        zero_stage=arguments.stage,
        offload=arguments.offload,
        processes=arguments.processes,
    )


def _print_tables(rows: list[Row]) -> None:
    print("| model | method | unit | weights | states | computed | published | agrees |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        agrees = "yes" if row.agrees else f"differs: {row.note or 'unexplained'}"
        print(
            f"| {row.model} | {row.method} | {row.unit} | {row.weights:.3f} | {row.states:.3f} "
            f"| {row.computed} | {row.published} | {agrees} |"
        )
    print(f"\n{sum(row.agrees for row in rows)} of {len(rows)} agree")


def _print_breakdown(found: Memory) -> None:
    print("| MB of a rank | device | host |")
    print("|---|---|---|")
    for part, on_device in asdict(found.device).items():
        print(f"| {part} | {on_device / MEGA:,.1f} | {getattr(found.host, part) / MEGA:,.1f} |")
    print(f"| total | {found.device.total / MEGA:,.1f} | {found.host.total / MEGA:,.1f} |")


def _setting(text: str) -> tuple[str, Any]:
    """key=value, the value as JSON, or as it stands where it is none."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value, such as rank=128")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        epilog="example: python -m benchmarks.memory --model llama-1b --method galore --set rank=512 --dtype bf16 "
        "--stage 2 --processes 8 --offload cpu",
    )
    parser.add_argument("--method", choices=list(METHOD_CONFIGS), help="default: the published tables")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the method, such as rank=64",
    )
    parser.add_argument("--model", default="llama-1b", choices=list(PRESETS))
    parser.add_argument("--vocabulary", type=int, default=32000, help="embedding rows")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--pretrained", action="store_true", help="loro then keeps the weights, frozen")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--offload", default="none", choices=["none", "cpu"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
