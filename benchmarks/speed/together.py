"""Many runs at once: learning rates of one configuration, one run after the other with all cores, and as many at a time
as there are cores with a thread each, as `peftkit bench run --workers` starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.speed import peftkit_arm
from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import Workload
from peftkit.environment import describe

LOWEST = 1e-4
"""The first learning rate; each next one is twice the last."""
Train = Callable[[Path, Sequence[str], int], dict[str, Any]]
"""Figures of the training of a configuration with overrides, on so many threads."""


def together(
    workload: Workload, count: int, steps: int, work: Path, results: Results, train: Train = peftkit_arm.train
) -> dict[str, Any]:
    """Measure both ways, once; whatever of it is kept is not measured again."""
    cores = os.cpu_count() or 1
    results.set("environment", describe())
    settings = workload.settings("lora", steps, work)
    ways = {"one after the other": 1, "together": cores}
    for name, at_once in ways.items():
        if name not in results.kept:
            results.set(name, _measured(workload, settings, count, at_once, cores // at_once, train))
            tell(f"{name}: {results.kept[name]['tokens_per_second']:,.0f} tokens/s")
    alone, all_at_once = (results.kept[name] for name in ways)
    pairs = zip(alone["losses"], all_at_once["losses"], strict=True)
    results.set("gain", all_at_once["tokens_per_second"] / alone["tokens_per_second"])
    results.set("memory", all_at_once["growth_bytes"] / alone["growth_bytes"])
    results.set(
        "largest_loss_difference", max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    )
    return results.kept


def _measured(
    workload: Workload, settings: Sequence[str], count: int, at_once: int, threads: int, train: Train
) -> dict[str, Any]:
    def one(number: int) -> dict[str, Any]:
        return train(workload.file, [*settings, f"training.learning_rate={LOWEST * 2**number}"], threads)

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        figures = list(pool.map(one, range(count)))
    wall = time.perf_counter() - began
    seconds = sum(each["seconds"] for each in figures) / at_once
    return {
        "at_once": at_once,
        "threads": threads,
        "wall_seconds": wall,
        "training_seconds": seconds,
        "tokens_per_second": sum(each["tokens"] for each in figures) / seconds,
        "growth_bytes": at_once * max(each["growth_bytes"] for each in figures),
        "losses": [each["losses"] for each in figures],
    }
