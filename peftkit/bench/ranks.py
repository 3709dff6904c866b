"""Whether methods come out in the same order on every data set, and how sure each place is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from peftkit.bench.resampling import resampled_means
from peftkit.bench.samples import Array, Samples
from peftkit.bench.statistics import check_level
from peftkit.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where one method stands."""

    name: str
    ranks: dict[str, float]
    """By data set; 1 is best, equals share the mean of their places."""
    mean_rank: float
    low: float
    high: float
    """The interval of the mean rank under resampling of seeds and examples."""
    first: float
    """The share of resamples in which it has the best mean rank; shared where several have."""


@dataclass(frozen=True)
class RankStability:
    """Places of all methods, best first, and how far data sets agree on them."""

    places: tuple[Place, ...]
    kendalls_w: float
    """Kendall & Babington Smith 1939: 1 where all data sets give one order, 0 where there is none in common."""
    p_value: float
    """Of W at least as large where each data set orders the methods at random, by permutation."""


def rank_stability(
    data_sets: Mapping[str, Mapping[str, Samples]], resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> RankStability:
    """Ranks by mean score on each data set, W over them, and their spread under the hierarchical bootstrap.

    All methods of a data set are resampled alike; data sets independently of one another.
    Raises DataError unless there are two methods at least, the same on every data set.
    """
    check_level("confidence", confidence)
    methods = _methods(data_sets)
    found = np.stack(
        [_ranks(np.array([[cells[name].mean for name in methods]]), cells)[0] for cells in data_sets.values()]
    )
    drawn = np.mean(
        [_drawn(cells, methods, resamples, seed + at) for at, cells in enumerate(data_sets.values())], axis=0
    )
    ends = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    best = drawn == drawn.min(axis=1, keepdims=True)
    first = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    places = [
        Place(
            name,
            {title: float(rank) for title, rank in zip(data_sets, found[:, at], strict=True)},
            float(found[:, at].mean()),
            float(ends[0, at]),
            float(ends[1, at]),
            float(first[at]),
        )
        for at, name in enumerate(methods)
    ]
    w, p_value = agreement(found, seed=seed)
    return RankStability(tuple(sorted(places, key=lambda one: (one.mean_rank, one.name))), w, p_value)


def agreement(ranks: Array, permutations: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Kendall's W of (D, K) ranks, and its p value by permuting every row.

    W = 12 Σ(Rⱼ − R̄)² / (D² (K³ − K) − D Σ(t³ − t)), t the sizes of ties (Kendall 1970, Rank Correlation Methods,
    section 6.8); 0 and 1 where every method has the same rank everywhere. With one data set W is 1 and so is p.
    """
    raters, items = ranks.shape
    sizes = [np.unique(row, return_counts=True)[1].astype(float) for row in ranks]
    whole = raters**2 * (items**3 - items) - raters * sum(float((one**3 - one).sum()) for one in sizes)
    if whole <= 0:
        return 0.0, 1.0
    random = np.random.default_rng(seed)
    shuffled = random.permuted(np.broadcast_to(ranks, (permutations, raters, items)), axis=2)
    found, by_chance = (12 * one.sum(axis=-2).var(axis=-1) * items / whole for one in (ranks, shuffled))
    return float(found), float((1 + (by_chance >= found - 1e-12).sum()) / (1 + permutations))


def _methods(data_sets: Mapping[str, Mapping[str, Samples]]) -> list[str]:
    named = {title: set(cells) for title, cells in data_sets.items()}
    if not named:
        raise DataError("ranks need one data set at least")
    everywhere = set.intersection(*named.values())
    for title, names in named.items():
        if names != everywhere:
            missing = ", ".join(sorted(names - everywhere))
            raise DataError(f"{missing} of {title} is missing on another data set: rank only what all have")
    if len(everywhere) < 2:
        raise DataError("ranks need two methods at least")
    return sorted(everywhere)


def _drawn(cells: Mapping[str, Samples], methods: list[str], resamples: int, seed: int) -> Array:
    """(B, K) ranks on one data set."""
    return _ranks(np.stack([resampled_means(cells[name], resamples, seed) for name in methods], axis=1), cells)


def _ranks(scores: Array, cells: Mapping[str, Samples]) -> Array:
    """(…, K) → (…, K): 1 for the best."""
    from scipy.stats import rankdata

    lower = {samples.lower_is_better for samples in cells.values()}
    if len(lower) > 1:
        raise DataError("cannot rank two different scores: lower_is_better must be the same")
    return rankdata(scores if lower == {True} else -scores, axis=-1)
