"""The command of the package, which describes it."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import benchmarks.reliability as package
from benchmarks.reliability.rows import Rows
from benchmarks.reliability.workbench import Workbench

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the experiments that are asked for; returns the exit code: 1 if a trial of peftkit is not good."""
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=[], metavar="EXPERIMENT", help="default: all of them")
    parser.add_argument("--tier", choices=("short", "full"), default="short")
    parser.add_argument("--columns", nargs="+", choices=package.COLUMNS, default=package.COLUMNS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/reliability, runs/reliability if short")
    parser.add_argument("--fresh", action="store_true", help="forget the trials that are done")
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(package.EXPERIMENTS):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(package.EXPERIMENTS)}")
    out = options.out or (RESULTS if options.tier == "full" else ROOT / "runs" / "reliability")
    bad = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch, Workbench(Path(scratch)) as bench:
        for name in options.experiments or package.EXPERIMENTS:
            experiment = import_module(f"benchmarks.reliability.{name}")
            rows = Rows(out / f"{name}.jsonl", experiment, options.tier, options.fresh)
            rows.complete(options.columns, bench)
            bad += rows.bad
            print(rows.summary(), flush=True)
    for row in bad:
        print(f"not good: {row}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    # before torch is imported, for what is measured in this process
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
