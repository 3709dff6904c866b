"""Many runs at once: learning rates of one configuration, one run after the other, each a process that has all cores,
and as `peftkit bench run` makes them: as many at a time as there are cores, a thread each, in forks of one process."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import Workload
from peftkit.bench.forks import Forks
from peftkit.bench.processes import Maker, Worker, how_it_ended
from peftkit.bench.store import Key, Record, Store
from peftkit.bench.worker import Job
from peftkit.config import load_run
from peftkit.environment import describe
from peftkit.errors import JobError

LOWEST = 1e-4
"""The first learning rate; each next one is twice the last."""
EVERY = 0.25
"""Seconds between two looks at how much memory is held."""


@dataclass(frozen=True)
class Way:
    """How runs are made."""

    at_once: int
    threads: int
    maker: Maker


def usual_ways() -> dict[str, Way]:
    """The two that are compared."""
    cores = os.cpu_count() or 1
    return {
        "one after the other": Way(1, cores, Worker(["peftkit.bench.worker"], cores)),
        "together": Way(cores, 1, Forks(1, cores)),
    }


def held(above: int | None = None) -> int:
    """Bytes that processes below one, or this, hold; memory that several share is counted once."""
    total = 0
    for process in psutil.Process(above).children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def together(
    workload: Workload,
    count: int,
    steps: int,
    work: Path,
    results: Results,
    ways: Mapping[str, Way] | None = None,
    holding: Callable[[], int] = held,
) -> dict[str, Any]:
    """Measure both ways, once; whatever of it is kept is not measured again."""
    chosen = ways or usual_ways()
    results.set("environment", describe())
    settings = workload.settings("lora", steps, work)
    most = max(way.at_once for way in chosen.values())
    with closing(chosen["together"].maker):
        # in turn, some runs each, so that a machine that gets slower does so for both
        for first in range(0, count, most):
            rates = [LOWEST * 2**number for number in range(first, min(first + most, count))]
            for name, way in chosen.items():
                part = f"{name}, from run {first + 1}"
                if part not in results.kept:
                    results.set(part, _measured(workload, settings, rates, way, holding))
                    tell(f"{part}: {results.kept[part]['tokens'] / results.kept[part]['seconds']:,.0f} tokens/s")
    for name, way in chosen.items():
        parts = [results.kept[f"{name}, from run {first + 1}"] for first in range(0, count, most)]
        results.set(name, {"at_once": way.at_once, "threads": way.threads} | _all(parts))
    alone, all_at_once = (results.kept[name] for name in chosen)
    pairs = zip(alone["losses"], all_at_once["losses"], strict=True)
    differences = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    results.set("largest_loss_differences", differences)
    results.set("memory", all_at_once["held_bytes"] / alone["held_bytes"])
    results.set("gain", all_at_once["tokens_per_second"] / alone["tokens_per_second"])
    results.set("gain_with_start", alone["wall_seconds"] / all_at_once["wall_seconds"])
    return results.kept


def _measured(
    workload: Workload, settings: Sequence[str], rates: Sequence[float], way: Way, holding: Callable[[], int]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _watched(holding) as most:

        def one(rate: float) -> Record:
            return _made(_job(workload, [*settings, f"training.learning_rate={rate}"], rate, folder), way.maker)

        began = time.perf_counter()
        with ThreadPoolExecutor(way.at_once) as pool:
            records = list(pool.map(one, rates))
        wall = time.perf_counter() - began
    costs = [record.cost for record in records if record.cost is not None]
    return {
        "wall_seconds": wall,
        "tokens": sum(cost.tokens for cost in costs),
        "seconds": sum(cost.seconds for cost in costs) / min(way.at_once, len(rates)),
        "held_bytes": max(most),
        "losses": [[loss for _, loss in record.losses] for record in records],
    }


def _job(workload: Workload, overrides: Sequence[str], rate: float, folder: str) -> Job:
    run = load_run(workload.file, overrides)
    key = Key(
        grid="together", backbone=run.backbone.name, data=workload.name, method="lora", budget="all",
        phase="trial", seed=run.training.seed, learning_rate=rate,
    )  # fmt: skip
    return Job(id=f"{rate:g}", key=key, run=run, folder=folder)


def _made(job: Job, maker: Maker) -> Record:
    code, said = maker.make(job)
    record = Store(Path(job.folder)).find(job.id)
    if record is None or record.cost is None:
        raise JobError(record.error if record and record.error else how_it_ended(code, said))
    return record


@contextmanager
def _watched(holding: Callable[[], int]) -> Iterator[list[int]]:
    """Look at how much is held, again and again; yields what was found so far."""
    found, ended = [holding()], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            found.append(holding())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        ended.set()
        watching.join()


def _all(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "wall_seconds": sum(one["wall_seconds"] for one in parts),
        "tokens_per_second": sum(one["tokens"] for one in parts) / sum(one["seconds"] for one in parts),
        "held_bytes": max(one["held_bytes"] for one in parts),
        "losses": [losses for one in parts for losses in one["losses"]],
    }
