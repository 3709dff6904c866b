"""Which of the learning rates that were tried did best on dev."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from peftkit.bench.store import Record


def best_rate(trials: Sequence[Record]) -> float | None:
    """The learning rate with the best mean score on dev; the smaller of two that are equal. None without any score."""
    means = dev_means(trials)
    if not means:
        return None
    lower = any(trial.dev.lower_is_better for trial in trials if trial.dev)
    return min(means, key=lambda rate: (means[rate] if lower else -means[rate], rate))


def dev_means(trials: Sequence[Record]) -> dict[float, float]:
    """Learning rate → mean score on dev, of finished trials, by rate."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        if trial.status == "finished" and trial.dev and trial.key.learning_rate is not None:
            found.setdefault(trial.key.learning_rate, []).append(trial.dev.value)
    return {rate: fmean(found[rate]) for rate in sorted(found)}
