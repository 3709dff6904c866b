"""The scores of one cell of a comparison: some seeds, all over the same test examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftkit.errors import DataError

Array = NDArray[np.float64]
Transform = Literal["identity", "exp"]
Scale = Literal["identity", "log", "logit"]


@dataclass(frozen=True, eq=False)
class Samples:
    """A score that is a ratio of sums over examples, for S seeds and N examples.

    `numerators` and `denominators` are (S, N); the score of a seed is transform(Σ numerators / Σ denominators):

    - accuracy: 1 where the example is right, and 1;
    - micro F1: twice the true positives, and predicted + referenced spans, 0 where an example has neither;
    - perplexity: summed negative log-likelihood, and tokens, with `transform="exp"` and `lower_is_better=True`.

    Row i of two methods is the same seed, and column j the same example: comparisons are paired over both.
    Raises DataError where shapes are wrong, a number is not finite, or a seed has nothing to divide by.
    """

    numerators: Array
    denominators: Array
    lower_is_better: bool = False
    transform: Transform = "identity"

    def __post_init__(self) -> None:
        for name in ("numerators", "denominators"):
            object.__setattr__(self, name, _matrix(name, getattr(self, name)))
        if self.numerators.shape != self.denominators.shape:
            raise DataError(
                f"numerators are {_size(self.numerators)} and denominators {_size(self.denominators)}: "
                "give both for the same seeds and examples"
            )
        if self.transform not in ("identity", "exp"):
            raise DataError(f"transform is {self.transform!r}: it must be identity or exp")
        if (self.denominators < 0).any():
            raise DataError("denominators below 0: they are counts, such as tokens or spans")
        empty = np.flatnonzero(self.denominators.sum(axis=1) == 0)
        if len(empty):
            raise DataError(f"all denominators of seed {empty[0]} (of {self.seeds}, from 0) are 0: it has no score")
        if not np.isfinite(self.values).all():
            raise DataError("exp of the ratio is beyond the largest number: give the ratio itself as the score")

    @property
    def seeds(self) -> int:
        """S."""
        return self.numerators.shape[0]

    @property
    def examples(self) -> int:
        """N."""
        return self.numerators.shape[1]

    @cached_property
    def values(self) -> Array:
        """The score of each seed, (S,)."""
        return score(self.numerators, self.denominators, self.transform)

    @property
    def mean(self) -> float:
        """The mean score over seeds."""
        return float(self.values.mean())

    @cached_property
    def per_example(self) -> Array:
        """What each example says of the score of each seed, (S, N); see `linearised`."""
        return linearised(self.numerators, self.denominators, self.transform)

    @cached_property
    def scale(self) -> Scale:
        """Where the spread of the score is even: `logit` for a share such as accuracy or F1, `log` for exp."""
        if self.transform == "exp":
            return "log"
        share = (self.numerators >= 0).all() and (self.numerators <= self.denominators).all()
        return "logit" if share else "identity"


def score(numerators: Array, denominators: Array, transform: Transform = "identity") -> Array:
    """(…, S, N) → (…, S): the ratio of sums, transformed."""
    return transformed(numerators.sum(axis=-1) / denominators.sum(axis=-1), transform)


def transformed(ratio: Array, transform: Transform) -> Array:
    """The score from its ratio; beyond the largest number it is infinite."""
    if transform == "identity":
        return ratio
    with np.errstate(over="ignore"):
        return np.exp(ratio)


def linearised(numerators: Array, denominators: Array, transform: Transform = "identity") -> Array:
    """(…, S, N) → (…, S, N): the score of a seed plus the influence of each example on it.

    With the ratio r and mean denominator d̄ of a seed, the influence of example n is f′(r) (numeratorₙ − r denominatorₙ)
    / d̄, the first term of the delta method (Cochran, Sampling Techniques, 3rd ed., section 2.11; Efron & Tibshirani
    1993, section 21.3). The mean over n is the seed's score exactly; for accuracy the values are 0 and 1 themselves.
    """
    total = denominators.sum(axis=-1, keepdims=True)
    ratio = numerators.sum(axis=-1, keepdims=True) / total
    value = transformed(ratio, transform)
    slope = 1.0 if transform == "identity" else value
    return value + slope * (numerators - ratio * denominators) * (denominators.shape[-1] / total)


def check_pair(first: Samples, second: Samples) -> None:
    """Raise DataError unless both can be compared seed by seed and example by example."""
    if first.numerators.shape != second.numerators.shape:
        raise DataError(
            f"cannot pair {_size(first.numerators)} with {_size(second.numerators)}: "
            "keep the seeds and examples that both have, in the same order"
        )
    if (first.lower_is_better, first.transform) != (second.lower_is_better, second.transform):
        raise DataError("cannot pair two different scores: lower_is_better and transform must be the same")


def _matrix(name: str, values: ArrayLike) -> Array:
    """A read-only (S, N) copy."""
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers, one row a seed, all rows of one length") from None
    if matrix.ndim != 2 or matrix.shape[0] < 1 or matrix.shape[1] < 2:
        raise DataError(f"{name} must be one row a seed and at least two examples a row, not shape {matrix.shape}")
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        seed, example = bad[0]
        raise DataError(f"{name} of seed {seed}, example {example} (from 0) is {matrix[seed, example]}: not a number")
    matrix.flags.writeable = False
    return matrix


def _size(matrix: Array) -> str:
    return f"{matrix.shape[0]} seeds × {matrix.shape[1]} examples"
