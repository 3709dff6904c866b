"""Methods side by side on the seeds that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from peftkit.bench.families import Pairs, holm
from peftkit.bench.results import Entry
from peftkit.bench.samples import Samples
from peftkit.bench.variance import mean_squares

AT_ONCE = 64
"""Pairs that are analysed together."""


def on_shared_seeds(first: Entry, second: Entry) -> tuple[Samples, Samples] | None:
    """Both on the seeds that both have; None where there are none, or they were tested on different rows."""
    if first.samples is None or second.samples is None or _tested_on(first) != _tested_on(second):
        return None
    shared = sorted(set(first.seeds) & set(second.seeds))
    return (_only(first, shared), _only(second, shared)) if shared else None


def comparable(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Those that all can be paired with one another: two seeds in common at least, where any method has several.

    Whoever has most seeds comes first; what does not fit to those before it is left out.
    """
    scored = [entry for entry in entries if entry.samples is not None]
    least = min(2, max((len(entry.seeds) for entry in scored), default=1))
    kept: list[Entry] = []
    for entry in sorted(scored, key=lambda one: -len(one.seeds)):
        fits = all(
            _tested_on(entry) == _tested_on(other) and len(set(entry.seeds) & set(other.seeds)) >= least
            for other in kept
        )
        if fits and len(entry.seeds) >= least and (entry.per_example or len(entry.seeds) > 1):
            kept.append(entry)
    return tuple(entry for entry in scored if entry in kept)


def all_pairs(entries: Sequence[Entry]) -> Pairs:
    """What `families.all_pairs` tells, of `comparable` entries whose seeds need not be the same, many pairs at once."""
    samples = {entry.method: entry.samples for entry in entries if entry.samples is not None}
    lower = any(one.lower_is_better for one in samples.values())
    ranked = sorted(entries, key=lambda one: (samples[one.method].mean * (1 if lower else -1), one.method))
    count = len(ranked)
    gains, raw, adjusted = np.zeros((count, count)), np.ones((count, count)), np.ones((count, count))
    found = sorted(_differences(ranked))
    for (row, column, gain, p), corrected in zip(found, holm([one[3] for one in found]), strict=True):
        better = -gain if lower else gain
        gains[row, column], gains[column, row] = better, -better
        raw[row, column] = raw[column, row] = p
        adjusted[row, column] = adjusted[column, row] = corrected
    names = tuple(entry.method for entry in ranked)
    return Pairs(names, np.array([samples[name].mean for name in names]), gains, raw, adjusted)


def _differences(ranked: Sequence[Entry]) -> Iterator[tuple[int, int, float, float]]:
    """(row, column, mean difference, two-sided p value) of every pair."""
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, column in combinations(range(len(ranked)), 2):
        shared = tuple(sorted(set(ranked[row].seeds) & set(ranked[column].seeds)))
        alike.setdefault(shared, []).append((row, column))
    for shared, pairs in alike.items():
        values = {at: _only(ranked[at], shared).per_example for at in {one for pair in pairs for one in pair}}
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            squares = mean_squares(np.stack([values[row] - values[column] for row, column in part]))
            for (row, column), mean, p in zip(part, squares.grand, squares.p_value(), strict=True):
                unknown = ranked[row].unvaried and ranked[column].unvaried
                yield row, column, float(mean), 1.0 if unknown else float(p)


def _only(entry: Entry, seeds: Sequence[int]) -> Samples:
    """The entry's samples of these seeds, in this order."""
    assert entry.samples is not None
    if tuple(seeds) == entry.seeds:
        return entry.samples
    rows = [entry.seeds.index(seed) for seed in seeds]
    samples = entry.samples
    return Samples(samples.numerators[rows], samples.denominators[rows], samples.lower_is_better, samples.transform)


def _tested_on(entry: Entry) -> tuple[int, bool, str]:
    assert entry.samples is not None
    return (entry.samples.examples, entry.per_example, entry.samples.transform)
