"""python -m trainer: run a specification, export a run, try a model out, list the methods."""

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from pydantic import ValidationError

from trainer import access, examination, logs, spans
from trainer.config import TrainingSpec, problems
from trainer.console import Console
from trainer.errors import RolledBackError, SpecError, TrainerError, classify
from trainer.events import Event, EventLog, Failed
from trainer.exporting import EXPORTS_BYTES, MOST_BYTES
from trainer.hosts import torchrun_needed
from trainer.launch import run_ranks
from trainer.methodconfig import METHOD_CONFIGS
from trainer.process import STARTED_BY, Origin, die_with_parent, free_port, leave
from trainer.rundir import RunDir

log = logging.getLogger("stiefel.trainer")

# Set by whoever starts a trainer and wants it to end with it: the starter's process id.
PARENT = "STIEFEL_PARENT_PID"


def main() -> int:
    arguments = _parser().parse_args()
    # Nothing is compiled here, and DeepSpeed loads torch's compiler all the same: two seconds of every start.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        return int(arguments.command(arguments))
    except TrainerError as error:
        _tell(error)
        return error.exit_code


def _tell(error: TrainerError) -> None:
    """With where it comes from, if nobody foresaw it."""
    cause = error.__cause__ if error.name == "unknown" else None
    if os.environ.get(logs.FORM) == "json":
        log.error("%s: %s", error.name, error, exc_info=cause)
        return
    if cause is not None:
        traceback.print_exception(cause)
    print(f"{error.name}: {error}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    form = logs.configure_trainer()
    rundir = RunDir(arguments.rundir)
    spec = _read_spec(rundir)
    _end_with_parent()
    origin, alone = Origin(), "RANK" not in os.environ
    if alone:
        if spec.resources.hosts > 1:
            raise torchrun_needed(spec, rundir)
        if spec.resources.processes > 1:
            return run_ranks(rundir, spec.resources.processes)
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ["MASTER_PORT"] = str(free_port())
    log, console = EventLog(rundir.events), Console(form)

    def emit(event: Event) -> None:
        log.write(event)
        console.show(event)
        spans.show(event)

    try:
        access.check(spec, access.Access.of_environment())
        if spec.resources.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Only now, so that a wrong spec is told within a blink and the launcher of ranks stays small.
        from trainer.train import train

        with spans.of_run():
            train(spec, rundir, emit, log.sync)
    except RolledBackError:
        # Which rank 0 has reported.
        if not alone:
            raise
        origin.again()
    except Exception as error:
        leaf = classify(error)
        rank = int(os.environ["RANK"])
        failed = Failed(step=log.last_step, reason=leaf.name, message=str(leaf), retryable=leaf.retryable, rank=rank)
        try:
            emit(failed)
        except OSError as full:
            print(f"the failure cannot be reported: {full}", file=sys.stderr)
        raise leaf from error
    finally:
        log.close()
    return 0


def export(arguments: argparse.Namespace) -> int:
    rundir = RunDir(arguments.rundir)
    _read_spec(rundir)
    _end_with_parent()
    form, out = arguments.format, Path(arguments.out)
    with redirect_stdout(sys.stderr):
        # DeepSpeed logs to whatever is stdout while it is imported, and stdout is for the answer.
        from trainer.exports.export import export as write

        step = write(rundir, out, form, arguments.checkpoint, arguments.shard_size, arguments.dtype)
    answer = {"step": step, "format": form, "path": str(out.resolve())}
    print(json.dumps(answer) if arguments.json else f"step {step} → {answer['path']}")
    return 0


def serve(arguments: argparse.Namespace) -> int:
    logs.configure_trainer()
    _end_with_parent()
    try:
        from trainer.generation.server import Patience
        from trainer.generation.server import serve as answer
    except ModuleNotFoundError as error:
        raise SpecError(f"serve: {error.name} is not installed; pip install 'stiefel[serve]' brings it") from error

    from trainer.generation.speaker import Speaker

    speaker = Speaker(arguments.device, arguments.exports_bytes)
    patience = Patience(arguments.waiting, arguments.per_owner, arguments.idle_seconds)
    answer(arguments.host, arguments.port, speaker, patience)
    return 0


def methods(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({name: config.model_json_schema() for name, config in METHOD_CONFIGS.items()}, indent=1))
    else:
        for name, config in METHOD_CONFIGS.items():
            print(f"{name:10} {config.summary}\n{'':10} {config.paper}")
    return 0


def _read_spec(rundir: RunDir) -> TrainingSpec:
    try:
        return TrainingSpec.model_validate_json(rundir.spec.read_text())
    except OSError as error:
        raise SpecError(f"{rundir.spec} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        lines = "".join(f"\n  {field}: {message}" for field, message in problems(error))
        raise SpecError(f"{rundir.spec} is refused:{lines}") from error


def _end_with_parent() -> None:
    if "RANK" in os.environ:
        # A rank under torchrun: its launcher was killed, so nobody is left who could restart or collect it. Which one
        # that is cannot be asked of the kernel, where it may have been killed already.
        die_with_parent(signal.SIGKILL, int(os.environ.get(STARTED_BY, os.getppid())))
    elif parent := os.environ.get(PARENT):
        # Under a supervisor that was killed: end as on a stop request, with a checkpoint.
        die_with_parent(signal.SIGTERM, int(parent))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        help="train RUNDIR/spec.json, resuming from RUNDIR/checkpoints",
        epilog="example: mkdir run && cp examples/galore.json run/spec.json && python -m trainer run run",
    )
    command.add_argument("rundir", metavar="RUNDIR")
    command.set_defaults(command=run)

    command = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face model directory, an adapter, or factors",
        epilog="example: python -m trainer export run merged --checkpoint best --shard-size 2GB",
    )
    command.add_argument("rundir", metavar="RUNDIR")
    command.add_argument("out", metavar="OUT", help="a new directory, or an empty one")
    command.add_argument(
        "--format",
        metavar="FORMAT",
        default="merged",
        help="merged: plain weights, for AutoModelForCausalLM (every method); peft: an adapter for PeftModel (lora, "
        "dora); factored: the factors alone, for trainer.exports.loading.load_factored (lowrank, and loro from random "
        "values). Default: merged",
    )
    command.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="newest",
        help="newest, best (the lowest held-out loss), or a step. Default: newest",
    )
    command.add_argument(
        "--shard-size",
        metavar="SIZE",
        default="5GB",
        help="most bytes of one weights file, and so about what the export holds in memory; a number and KB, MB, GB or "
        "TB. Default: 5GB",
    )
    command.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights. Default: the run's own")
    command.add_argument("--json", action="store_true", help="print the answer as JSON")
    command.set_defaults(command=export)

    examination.add_to(commands)
    command = commands.add_parser(
        "serve",
        help="answer the API's requests for text, to try models out; no inference server",
        epilog="example: STIEFEL_GENERATOR_SECRET=$(openssl rand -hex 16) python -m trainer serve --port 8001; the API "
        "gets the same secret, and STIEFEL_GENERATOR_URL=http://127.0.0.1:8001",
    )
    command.add_argument("--host", default="127.0.0.1", help="of the interface; 0.0.0.0: all. Default: 127.0.0.1")
    command.add_argument("--port", type=int, default=8001, help="Default: 8001")
    command.add_argument(
        "--device", choices=["any", "gpu", "cpu"], default="any", help="any: a GPU where there is one. Default: any"
    )
    command.add_argument(
        "--waiting", type=int, default=8, help="requests that may wait, besides the one that is answered. Default: 8"
    )
    command.add_argument(
        "--per-owner",
        type=_at_least(1),
        default=3,
        help="requests of one API key that may wait, the one that is answered included. Default: 3",
    )
    command.add_argument(
        "--idle-seconds", type=float, default=600, help="after which an unused model is forgotten. Default: 600"
    )
    command.add_argument(
        "--exports-bytes",
        type=_at_least(0),
        metavar="BYTES",
        default=os.environ.get(EXPORTS_BYTES, MOST_BYTES),
        help="of the models of jobs that were made beside all runs; those not used for longest are removed. Default: "
        f"{EXPORTS_BYTES}, which workers obey too, or {MOST_BYTES}",
    )
    command.set_defaults(command=serve)

    command = commands.add_parser(
        "methods", help="list the methods", epilog="example: python -m trainer methods --json"
    )
    command.add_argument("--json", action="store_true", help="print each method's JSON Schema")
    command.set_defaults(command=methods)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    """Of an argument: a whole number that is not below."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return number


if __name__ == "__main__":
    leave(main())
