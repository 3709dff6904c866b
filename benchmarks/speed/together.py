"""Many runs at once: learning rates of one configuration, one run after the other with all cores, and as many at a time
as there are cores with a thread each, as `peftkit bench run --workers` starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
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
    ways = {"one after the other": (1, cores), "together": (cores, 1)}

    def one(number: int, threads: int) -> dict[str, Any]:
        return train(workload.file, [*settings, f"training.learning_rate={LOWEST * 2**number}"], threads)

    # in turn, some runs each, so that a machine that gets slower does so for both
    for first in range(0, count, cores):
        numbers = range(first, min(first + cores, count))
        for name, (at_once, threads) in ways.items():
            part = f"{name}, from run {first + 1}"
            if part not in results.kept:
                results.set(part, _measured(numbers, at_once, threads, one))
                tell(f"{part}: {results.kept[part]['tokens'] / results.kept[part]['seconds']:,.0f} tokens/s")
    for name, (at_once, threads) in ways.items():
        parts = [results.kept[f"{name}, from run {first + 1}"] for first in range(0, count, cores)]
        results.set(name, {"at_once": at_once, "threads": threads} | _all(parts))
    alone, all_at_once = (results.kept[name] for name in ways)
    losses = [list(chain.from_iterable(one["losses"])) for one in (alone, all_at_once)]
    results.set("largest_loss_difference", max(abs(a - b) for a, b in zip(*losses, strict=True)))
    results.set("memory", all_at_once["growth_bytes"] / alone["growth_bytes"])
    results.set("gain", all_at_once["tokens_per_second"] / alone["tokens_per_second"])
    return results.kept


def _measured(
    numbers: Sequence[int], at_once: int, threads: int, one: Callable[[int, int], dict[str, Any]]
) -> dict[str, Any]:
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        figures = list(pool.map(lambda number: one(number, threads), numbers))
    return {
        "wall_seconds": time.perf_counter() - began,
        "tokens": sum(each["tokens"] for each in figures),
        "seconds": sum(each["seconds"] for each in figures) / min(at_once, len(numbers)),
        "growth_bytes": min(at_once, len(numbers)) * max(each["growth_bytes"] for each in figures),
        "losses": [each["losses"] for each in figures],
    }


def _all(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "wall_seconds": sum(one["wall_seconds"] for one in parts),
        "tokens_per_second": sum(one["tokens"] for one in parts) / sum(one["seconds"] for one in parts),
        "growth_bytes": max(one["growth_bytes"] for one in parts),
        "losses": [losses for one in parts for losses in one["losses"]],
    }
