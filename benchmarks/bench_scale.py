"""How long a grid of many runs takes to plan, to read and to report, all figures made up.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_scale

1,000 cells: 4 backbones × 10 data sets × 25 methods, each with 5 trials on dev and 5 final runs of 1,000 test examples,
so 10,000 runs. `status` is the command, which plans every run of the grid's file and finds its record; `records` reads
the records alone. One process, one thread; files are in the disk's cache, because they have just been written. Where
other work shares the processor, which the load averages tell, the processor's seconds are what counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.made_results import Made, Method, write
from peftkit.bench.cells import cells, load_grid
from peftkit.bench.grid import Grid
from peftkit.bench.store import Answers, Key, Record
from peftkit.environment import describe

ROOT = Path(__file__).parent.parent
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
CODE = {
    "records": "from peftkit.bench.store import Store; assert sum(1 for _ in Store(Path(sys.argv[1])).records())",
    "status": "from peftkit.cli import main; main(['bench', 'status', sys.argv[3], '--folder', sys.argv[1]])",
    "report": "from peftkit.bench.report import report; report(Path(sys.argv[1]), Path(sys.argv[2]))",
}
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=int, default=25)
    parser.add_argument("--data-sets", type=int, default=10)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench_scale.json")
    options = parser.parse_args()
    made = Made(
        methods=[Method("full", 0.9, 22_000_000), Method("head", 0.8, 800), *_others(options.methods - 2)],
        backbones=tuple(f"backbone-{number}" for number in range(4)),
        data=tuple(f"data-{number:02}" for number in range(options.data_sets)),
        rates=RATES,
        examples=options.examples,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, out, file = (Path(scratch) / name for name in ("results", "report", "made.yaml"))
        count = write(folder, planned_runs(made, grid_of(made, file)))
        seconds = {name: timed(code, folder, out, file) for name, code in CODE.items()}
        sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    document = {
        "command": " ".join(["python -m benchmarks.bench_scale", *sys.argv[1:]]),
        "environment": describe(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
        "runs": count,
        "cells": 4 * options.data_sets * options.methods,
        "examples": options.examples,
        "measured": seconds,
        "bytes": sizes,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"runs": count, **seconds}, indent=2))


def grid_of(made: Made, file: Path) -> Grid:
    """A grid with the names of what is made up, written to `file`."""
    rows = file.with_name("rows.csv")
    rows.write_text("text,label\n" + "good,1\nbad,0\n" * 8, encoding="utf-8")

    def data(place: int) -> dict[str, Any]:
        return {"kind": "sequence_classification", "data": {"train": str(rows)}, "max_length": 32 + place}

    def method(place: int, name: str) -> dict[str, Any]:
        return {"kind": name} if name in ("full", "head") else {"kind": "lora", "rank": place}

    tree = {
        "name": "made",
        "backbones": {
            name: {"name": "bundled:minilm", "dropout": place / 100} for place, name in enumerate(made.backbones)
        },
        "data": {name: {"task": data(place)} for place, name in enumerate(made.data)},
        "methods": {
            one.name: {"method": method(place, one.name), "learning_rates": made.rates}
            for place, one in enumerate(made.methods)
        },
        "seeds": made.seeds,
    }
    file.write_text(json.dumps(tree), encoding="utf-8")  # which YAML contains
    return load_grid(file)


def planned_runs(made: Made, grid: Grid) -> Iterator[tuple[Record, Answers | None]]:
    """The made-up runs under the names that the grid gives them."""
    known = {(cell.backbone, cell.data, cell.budget, cell.method): cell for cell in cells(grid)}

    def name(key: Key) -> str:
        cell = known[key.cell]
        assert key.learning_rate is not None
        one = cell.trial(key.learning_rate) if key.phase == "trial" else cell.final(key.seed, key.learning_rate)
        return one.id

    for record, answers in made.runs():
        yield record.model_copy(update={"id": name(record.key)}), answers


def timed(code: str, folder: Path, out: Path, grid: Path) -> dict[str, float]:
    """Wall and CPU seconds of a fresh process, from its start to its end, and its peak memory in MiB."""
    program = f"import sys; from pathlib import Path; {code}; {PEAK}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-c", program, str(folder), str(out), str(grid)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=900)
    after, wall = os.times(), time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_mib": round(int(done.stderr) / 1024)}


def _others(count: int) -> list[Method]:
    return [
        Method("lora" if at == 0 else f"method-{at:02}", 0.897 - 0.003 * at, 50_000 * (at + 1)) for at in range(count)
    ]


if __name__ == "__main__":
    main()
