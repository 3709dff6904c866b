"""The hierarchical bootstrap over seeds and examples.

All seeds share their examples, so both are drawn independently and each pair of a drawn seed and a drawn example counts
(the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1, 386-411). A draw is a pair of weights, how often
each seed and each example was drawn, and all draws are two matrix products.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from peftkit.bench.samples import Array, Samples, check_pair, transformed
from peftkit.bench.statistics import Interval, check_level
from peftkit.errors import DataError

RESAMPLES = 2000


@lru_cache(maxsize=8)
def weights(seeds: int, examples: int, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Array, Array]:
    """Shares of each draw: (B, S) and (B, N), rows that sum to 1. Whoever is compared shares them, hence pairs."""
    if resamples < 1:
        raise DataError(f"{resamples} resamples: one at least")
    random = np.random.default_rng(seed)
    drawn = [
        random.multinomial(count, np.full(count, 1 / count), size=resamples) / count for count in (seeds, examples)
    ]
    for one in drawn:
        one.flags.writeable = False
    return drawn[0], drawn[1]


def resampled_means(samples: Samples, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(B,): the mean score over drawn seeds on drawn examples. With one seed, examples alone are drawn.

    Raises DataError where a draw holds nothing to divide by: too few examples count.
    """
    of_seeds, of_examples = weights(samples.seeds, samples.examples, resamples, seed)
    below = of_examples @ samples.denominators.T
    if (below == 0).any():
        counted = int((samples.denominators > 0).any(axis=0).sum())
        raise DataError(f"only {counted} of {samples.examples} examples count for the score: too few to resample")
    values = transformed(of_examples @ samples.numerators.T / below, samples.transform)
    return np.einsum("bs,bs->b", of_seeds, values)


def bootstrap_interval(
    samples: Samples, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentiles of the resampled means, stretched about the mean by √(S / (S − 1)), which S draws of S lack.

    Shares end at 0 and 1. How it fares beside `interval` is in benchmarks/results/bench_statistics.json.
    """
    check_level("confidence", confidence)
    tail = (1 - confidence) / 2
    ends = np.quantile(resampled_means(samples, resamples, seed), [tail, 1 - tail])
    low, high = samples.mean + (ends - samples.mean) * stretch(samples.seeds)
    if samples.scale == "logit":
        low, high = max(low, 0.0), min(high, 1.0)
    over = f"{samples.seeds} seeds and " if samples.seeds > 1 else ""
    how = (
        f"{100 * confidence:g} % over {over}{samples.examples:,} examples: hierarchical bootstrap, {resamples:,} draws"
    )
    return Interval(samples.mean, float(low), float(high), how, confidence)


def paired_bootstrap_p(first: Samples, second: Samples, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p value of no difference: the share of draws as far from the difference as that is from 0.

    Seeds and examples are drawn for both alike; (1 + count) / (1 + B), so never 0 (Davison & Hinkley 1997, section
    4.2), with distances stretched as in `bootstrap_interval`.
    """
    check_pair(first, second)
    found = first.mean - second.mean
    drawn = resampled_means(first, resamples, seed) - resampled_means(second, resamples, seed)
    far = np.abs(drawn - found) * stretch(first.seeds) >= abs(found) * (1 - 1e-12)
    return float((1 + far.sum()) / (1 + resamples))


def stretch(seeds: int) -> float:
    """√(S / (S − 1)), 1 with one seed."""
    return float(np.sqrt(seeds / (seeds - 1))) if seeds > 1 else 1.0
