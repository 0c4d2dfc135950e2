"""Start a service, break it as a seed says, and see whether it keeps its promises."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import Result, carry_out
from tests.chaos.plan import GROUPS, kinds_of, make_plan
from tests.chaos.report import as_json, as_markdown
from tests.chaos.specs import SPECS, undisturbed

CACHE = Path(".stiefel") / "chaos-curves"


def main() -> int:
    arguments = _arguments()
    results: list[Result] = []
    for seed in arguments.seed:
        # Not far below the root, and of its own: it is removed when all is well.
        home = Path(tempfile.mkdtemp(prefix=f"stiefel-chaos-{seed}-"))
        plan = make_plan(
            seed, arguments.seconds, arguments.database, tuple(SPECS), arguments.faults, jobs=arguments.jobs
        )
        say(f"seed {seed}, {arguments.database}, {len(plan.faults)} faults in {plan.seconds:g} s, in {home}")
        curves = undisturbed(SPECS, home / "quiet", CACHE)
        result = carry_out(plan, home / "home", curves, say)
        results.append(result)
        (home / "campaign.log").write_text("\n".join(result.lines) + "\n")
        (home / "report.json").write_text(as_json([result]))
        say(f"seed {seed}: {'every promise kept' if result.kept else 'PROMISES BROKEN, see ' + str(home)}")
        if result.kept and not arguments.keep:
            shutil.rmtree(home, ignore_errors=True)
    text = as_json(results) if arguments.json else as_markdown(results)
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(text + "\n")
    print(text)
    return 0 if all(result.kept for result in results) else 1


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        epilog="example: python -m tests.chaos --seed 1 2 3 --seconds 180 --database postgresql --faults worker,broker",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[1], metavar="N", help="one campaign each. Default: 1")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="of faults, for each. Default: 120")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite", help="default: sqlite")
    parser.add_argument(
        "--faults", default="all", metavar="WHICH", help=f"all, or some of {','.join(GROUPS)}. Default: all"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="at most. Default: enough to keep two workers busy")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--json", action="store_true", help="the report as JSON instead of Markdown")
    parser.add_argument("--keep", action="store_true", help="keep the directory also when every promise was kept")
    arguments = parser.parse_args()
    arguments.faults = GROUPS if arguments.faults == "all" else tuple(arguments.faults.split(","))
    try:
        kinds_of(arguments.faults, arguments.database)
    except ValueError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
