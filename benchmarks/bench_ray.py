"""A grid on a local Ray cluster, a worker of which is killed in the middle, beside the same grid in plain processes.

    python -m benchmarks.bench_ray                          # benchmarks/grids/smoke.yaml; twice its time
    python -m benchmarks.bench_ray GRID --workers 3 --out result.json

Records are compared but for times and the machine, answers byte by byte. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from peftkit.bench.store import ANSWERS, Store
from peftkit.environment import describe

ROOT = Path(__file__).parent.parent
TASK = "peftkit.bench.tethered"
"""Of a run on Ray: a child of the Ray process that waits for it."""
OUTCOMES = {"cost", "environment"}
"""What of a record may differ from machine to machine and time to time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="?", default=ROOT / "benchmarks" / "grids" / "smoke.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bench_ray.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        local, ray = (Path(scratch) / name for name in ("local", "ray"))
        seconds = {"local": ran(options.grid, local, ["--workers", str(options.workers)])}
        killed: list[psutil.Process] = []
        killer = threading.Thread(target=kill_a_task, args=(ray, killed), daemon=True)
        killer.start()
        seconds["ray"] = ran(options.grid, ray, ["--workers", str(options.workers), "--engine", "ray"])
        first, second = comparable(Store(local)), comparable(Store(ray))
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    document = {
        "command": " ".join(["python -m benchmarks.bench_ray", *sys.argv[1:]]),
        "environment": describe(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
        "records_and_answers": len(first),
        "ray_processes_killed": len(killed) // 2,
        "differing": differing,
        "seconds": seconds,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))
    sys.exit(1 if differing or not killed else 0)


def ran(grid: Path, folder: Path, options: list[str]) -> float:
    """Seconds that `peftkit bench run` takes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "peftkit.cli", "bench", "run", str(grid), "--folder", str(folder), *options]
    subprocess.run(command, check=True)
    return round(time.perf_counter() - start, 1)


def kill_a_task(folder: Path, killed: list[psutil.Process], runs: int = 1, patience: float = 3600.0) -> None:
    """Once `runs` records are in `folder`, SIGKILL the Ray process of a run that is under way below this process.

    Args:
        killed: gets that process, and the one that computed the run.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        tasks = tasks_below() if len(list(folder.glob("runs/*.json"))) >= runs else []
        for task in tasks:
            try:
                waits = psutil.Process(task.ppid())
                waits.kill()
            except psutil.Error:  # the run has just ended
                continue
            killed += [waits, task]
            return
        time.sleep(0.1)


def tasks_below() -> list[psutil.Process]:
    """The processes below this one that compute a run on Ray."""
    return [one for one in psutil.Process().children(recursive=True) if TASK in _command(one)]


def comparable(store: Store) -> dict[str, Any]:
    """What must be the same wherever the runs took place: records by id, answers by file."""
    return {one.id: one.model_dump(exclude=OUTCOMES) for one in store.records()} | {
        file.name: file.read_bytes() for file in (store.folder / ANSWERS).glob("*")
    }


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
