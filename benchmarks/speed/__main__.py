"""The command of the package, which describes it."""

import argparse
import os
import sys
from pathlib import Path

import benchmarks.speed as package
from benchmarks.speed import report
from benchmarks.speed.arms import arms_of
from benchmarks.speed.floor import listed
from benchmarks.speed.gate import gate
from benchmarks.speed.profile import profiled
from benchmarks.speed.results import RESULTS, Results
from benchmarks.speed.rounds import Rounds
from benchmarks.speed.scaling import scaling
from benchmarks.speed.seeds import seeds
from benchmarks.speed.together import together
from benchmarks.speed.workloads import ROOT, WORKLOADS
from peftkit.console import Parser, guard, positive
from peftkit.errors import JobError, UsageError

WORK = ROOT / "runs" / "speed"


def main() -> None:
    """Do what is asked for."""
    options = _options()
    results, work = options.results, options.work.absolute()
    if options.list:
        for one in WORKLOADS.values():
            print(f"{one.name}: {one.title}\n  " + "\n  ".join(arm.name for arm in arms_of(one)))
    elif options.report:
        for file in report.write(results, options.docs):
            print(file)
    elif options.scaling:
        kept = Results(results / "scaling.json", {"steps": options.steps})
        kept.set("command", _command(f"--scaling --steps {options.steps}"))
        scaling(options.steps, work, kept)
    elif options.workload is None:
        raise UsageError(f"--workload: name one of {', '.join(WORKLOADS)}, or ask for --scaling, --report or --list")
    elif options.gate:
        _gate(options, work)
    elif options.together:
        _together(options, work)
    elif options.profile:
        kept = Results(results / f"profile-{options.workload}.json", {"workload": options.workload})
        kept.set("command", _command(f"--profile --workload {options.workload} --steps {options.steps}"))
        profiled(WORKLOADS[options.workload], options.steps, work, kept)
    elif options.seeds:
        kept = Results(results / f"seeds-{options.workload}.json", {"workload": options.workload})
        kept.set("command", _command(f"--seeds {options.seeds} --workload {options.workload}"))
        for pair in seeds(WORKLOADS[options.workload], options.seeds, work, kept)["pairs"]:
            print(f"{pair['first']} − {pair['second']}: {pair['difference']:+.4f}, p = {pair['p_value']:.2f}")
    else:
        _measure(options, work)


def _measure(options: argparse.Namespace, work: Path) -> None:
    workload = WORKLOADS[options.workload]
    asked = {"workload": workload.name, "steps": options.steps, "batch": workload.batch}
    kept = Results(options.results / f"{workload.name}.json", asked)
    kept.set("command", _command(f"--workload {workload.name} --rounds {options.rounds} --steps {options.steps}"))
    if options.note:
        kept.set("note", options.note)
    pythons = {"trainer": sys.executable, "trl": options.trl_python, "adapters": options.adapters_python}
    Rounds(workload, options.steps, work, kept, pythons).measure(options.rounds, options.arms)
    floors = kept.kept["floor"]
    print("\n".join(listed(floors["lora"], floors["step_tokens"])))
    print("\n".join(report.table(kept.kept)))


def _gate(options: argparse.Namespace, work: Path) -> None:
    workload = WORKLOADS[options.workload]
    asked = {"workload": workload.name, "steps": options.steps, "batch": options.batch or workload.batch}
    kept = Results(options.results / f"gate-{workload.name}.json", asked)
    arguments = f"--gate --workload {workload.name} --steps {options.steps}"
    kept.set("command", _command(arguments + (f" --batch {options.batch}" if options.batch else "")))
    found = gate(workload, options.steps, options.batch, work, kept)
    if not found["passes"]:
        failed = [name for name, one in found["settings"].items() if one["is_gated"] and not one["passes"]]
        raise JobError(f"not what stock computes: {', '.join(failed)}; {kept.file} has the figures")


def _together(options: argparse.Namespace, work: Path) -> None:
    asked = {"workload": options.workload, "runs": options.together, "steps": options.steps}
    kept = Results(options.results / f"together-{options.workload}.json", asked)
    kept.set(
        "command", _command(f"--together {options.together} --workload {options.workload} --steps {options.steps}")
    )
    found = together(WORKLOADS[options.workload], options.together, options.steps, work, kept)
    print(f"{found['gain']:.2f} times the speed, {found['memory']:.2f} times the memory of one")


def _command(arguments: str) -> str:
    return f"python -m benchmarks.speed {arguments}"


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.speed",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=12)
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="default: all of the workload")
    parser.add_argument("--batch", type=positive, help="examples of a step of the gate; default: the workload's")
    parser.add_argument("--note", default="", help="about the circumstances, kept in the result file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gate", action="store_true", help="compare losses and gradients with stock")
    what.add_argument("--profile", action="store_true", help="show where the time of a step goes")
    what.add_argument("--together", type=positive, metavar="RUNS", help="compare runs at once with one after the other")
    what.add_argument("--seeds", type=positive, metavar="COUNT", help="compare final scores with stock")
    what.add_argument("--scaling", action="store_true", help="measure time and memory against length, batch, …")
    what.add_argument("--report", action="store_true", help="write docs/speed.md and its chart")
    what.add_argument("--list", action="store_true", help="show workloads and arms")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=report.DOCS, metavar="FOLDER", help="of the report")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="plans and made backbones")
    for tool in ("trl", "adapters"):
        variable = f"SPEED_{tool.upper()}_PYTHON"
        named = os.environ.get(variable) or sys.executable
        parser.add_argument(f"--{tool}-python", default=named, metavar="PYTHON", help=f"with {tool}; or {variable}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(guard(main))
