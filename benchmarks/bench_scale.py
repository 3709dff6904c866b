"""How long a store of many runs takes to read and to report, all figures made up.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_scale

1,000 cells: 4 backbones × 10 data sets × 25 methods, each with 5 trials on dev and 5 final runs of 1,000 test examples,
so 10,000 runs. One process, one thread; files are in the disk's cache, because they have just been written. Where other
work shares the processor, which the load averages tell, the processor's seconds are what counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.made_results import Made, Method, write
from peftkit.environment import describe

ROOT = Path(__file__).parent.parent
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
CODE = {
    "status": "from peftkit.bench.store import Store; print(sum(1 for _ in Store(Path(sys.argv[1])).records()))",
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
        methods=[Method("full", 0.9, 22_000_000), Method("lora", 0.898, 300_000), *_others(options.methods - 2)],
        backbones=tuple(f"backbone-{number}" for number in range(4)),
        data=tuple(f"data-{number:02}" for number in range(options.data_sets)),
        rates=RATES,
        examples=options.examples,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "results", Path(scratch) / "report"
        count = write(folder, made.runs())
        seconds = {name: timed(code, folder, out) for name, code in CODE.items()}
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


def timed(code: str, folder: Path, out: Path) -> dict[str, float]:
    """Wall and CPU seconds of a fresh process, from its start to its end, and its peak memory in MiB."""
    program = f"import sys; from pathlib import Path; {code}; {PEAK}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-c", program, str(folder), str(out)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=900)
    after, wall = os.times(), time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_mib": round(int(done.stderr) / 1024)}


def _others(count: int) -> list[Method]:
    return [Method(f"method-{at:02}", 0.897 - 0.003 * at, 50_000 * (at + 1)) for at in range(count)]


if __name__ == "__main__":
    main()
