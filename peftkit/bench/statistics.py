"""What may be concluded from a few seeds on one test set: intervals, differences, and "as good as".

Chosen by simulation: benchmarks/bench_statistics.py, whose result has all figures. For 5 seeds that spread by 0 to 2
points, 600 and 1,300 examples, accuracies of 0.85 and 0.97 and a micro F1 of 0.81, 95 % intervals hold the truth in

- 94.7-97.0 %: two-way random effects, critical value of Cochran and Cox, logit scale; this is `interval`;
- 90.0-97.0 % without the logit scale, 88.5-96.1 % with Satterthwaite's degrees of freedom too;
- 84.2-97.3 %: percentile bootstrap over seeds and examples; 87.4-98.8 % stretched by √(S / (S − 1));
- 65.3-90.7 %: t over seeds, which share their examples; 47.9-95.2 %: normal, over examples alone.

Equal methods are told apart at 5 % in 3.7-4.6 % of tests by `difference`, and any of 11 after Holm in 1.8-3.9 %: a
little too seldom, where examples count as much as seeds. Satterthwaite's degrees of freedom reach 5.8 and 9.9 %, the
paired bootstrap 5.9 and 6.4 %, t over seeds 11.8 and 12.9 %, McNemar's test of one seed 48 and 94 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from peftkit.bench.samples import Array, Samples, Scale, check_pair
from peftkit.bench.variance import Components, MeanSquares, mean_squares
from peftkit.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A mean score with the interval that holds the expected score with probability `confidence`."""

    mean: float
    low: float
    high: float
    how: str
    """Over what, and by which method."""
    confidence: float = 0.95


@dataclass(frozen=True)
class Difference:
    """The first minus the second, paired over seeds and examples, in units of the score."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference."""
    standard_error: float
    components: Components
    """Variances of the paired differences; what `power` asks for."""
    how: str
    better_if_positive: bool = True
    """False where a lower score is better."""
    confidence: float = 0.95

    @property
    def gain(self) -> float:
        """By how much the first is better; negative where it is worse."""
        return self.mean if self.better_if_positive else -self.mean


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of whether the first is as good as the second, within `margin`."""

    gain: float
    """By how much the first is better; negative where it is worse."""
    margin: float
    p_equivalent: float
    """Of the hypothesis that they are `margin` or more apart."""
    p_not_worse: float
    """Of the hypothesis that the first is worse by `margin` or more."""
    p_worse: float
    """Of the hypothesis that the first is worse by `margin` at most."""
    level: float = 0.05

    @property
    def verdict(self) -> str:
        """`as good as`, `not worse than` (maybe better), `worse than` (by more than the margin), or `undecided`."""
        if self.p_equivalent <= self.level:
            return "as good as"
        if self.p_not_worse <= self.level:
            return "not worse than"
        return "worse than" if self.p_worse <= self.level else "undecided"


@dataclass(frozen=True)
class McNemar:
    """Where two classifiers of one seed differ, and how likely so uneven a split is among equals."""

    only_first: int
    """Examples that only the first has right."""
    only_second: int
    p_value: float


def interval(samples: Samples, confidence: float = 0.95) -> Interval:
    """The interval of the expected score over new seeds and new examples; with one seed, over new examples alone.

    mean ± critical × standard error, of the two-way random-effects analysis in `peftkit.bench.variance`, on the
    logit scale for shares and the log scale for perplexities, where spreads are even: g(mean) ± critical × standard
    error × |g′(mean)|. Where every example of every seed is right (or wrong), the bound of Clopper & Pearson 1934 for
    that many examples.
    """
    check_level("confidence", confidence)
    squares = mean_squares(samples.per_example)
    low, high = limits(squares, samples.scale, confidence, _counted(samples))
    how = f"{100 * confidence:g} % {_over(squares)}: two-way random effects"
    return Interval(samples.mean, float(low), float(high), how, confidence)


def limits(squares: MeanSquares, scale: Scale, confidence: float, counted: int) -> tuple[Array, Array]:
    """Lower and upper ends for each of (…) means; `counted` examples are behind a share that is 0 or 1."""
    mean = squares.grand
    half = squares.critical(1 - confidence) * np.sqrt(squares.variance)
    if scale == "identity":
        return mean - half, mean + half
    if scale == "log":
        stretch = _exp(half / mean)
        return mean / stretch, mean * stretch
    least = ((1 - confidence) / 2) ** (1 / counted)
    none, whole = mean <= 0, mean >= 1
    inside = np.where(none | whole, 0.5, mean)
    odds, stretch = inside / (1 - inside), _exp(half / (inside * (1 - inside)))
    low, high = odds / (odds + stretch), odds / (odds + 1 / stretch)
    return np.select([none, whole], [0.0, least], low), np.select([none, whole], [1 - least, 1.0], high)


def difference(first: Samples, second: Samples, confidence: float = 0.95) -> Difference:
    """First minus second: mean, interval and two-sided p value over new seeds and new examples.

    The values of `Samples.per_example` are subtracted seed by seed and example by example, and analysed as in
    `interval`, on the scale of the score. Raises DataError where the two cannot be paired.

    Where no example of n tells two shares apart, they may still differ on up to 1 − (α / 2)^(1 / n) of all examples;
    where every example does, alike, the sign test has p = 2 / 2ⁿ.
    """
    check_level("confidence", confidence)
    squares = paired(first, second)
    error = float(np.sqrt(squares.variance))
    half = float(squares.critical(1 - confidence)) * error
    p_value = float(squares.p_value())
    if error == 0 and first.scale == "logit":
        unseen = 1 - ((1 - confidence) / 2) ** (1 / _counted(first, second))
        half, p_value = unseen, 1.0 if squares.grand == 0 else 2 * 0.5 ** _counted(first, second)
    mean = first.mean - second.mean
    return Difference(
        mean,
        mean - half,
        mean + half,
        p_value,
        error,
        squares.components,
        f"{100 * confidence:g} % {_over(squares)}, paired: two-way random effects",
        not first.lower_is_better,
        confidence,
    )


def equivalence(first: Samples, second: Samples, margin: float, level: float = 0.05) -> Equivalence:
    """Whether the first is as good as the second, within `margin` in units of the score.

    Two one-sided tests (Schuirmann 1987): both that the first is not worse by `margin`, and that it is not better by
    as much, must be shown at `level`. The margin belongs to the plan of an experiment, not to its results. Where no
    example of n tells two shares apart, p is the probability (1 − margin)ⁿ of that, were they to differ on the margin.
    """
    check_level("level", level)
    if not (np.isfinite(margin) and margin > 0):
        raise DataError(f"a margin of {margin} is none: say how far apart scores may be and still count as equal")
    squares = paired(first, second)
    sign = -1.0 if first.lower_is_better else 1.0
    not_worse = float(above(squares, -margin, sign))
    not_better = 1 - float(above(squares, margin, sign))
    if squares.variance == 0 and squares.grand == 0 and first.scale == "logit":
        not_worse = not_better = max(1 - margin, 0.0) ** _counted(first, second)
    return Equivalence(sign * float(squares.grand), margin, max(not_worse, not_better), not_worse, 1 - not_worse, level)


def above(squares: MeanSquares, bound: float, sign: float = 1.0) -> Array:
    """One-sided p value of the hypothesis that `sign` × mean is `bound` or less; 0.5 where it is exactly there."""
    half = squares.p_value(sign * bound) / 2
    return np.where(sign * squares.grand > bound, half, 1 - half)


def paired(first: Samples, second: Samples) -> MeanSquares:
    """The analysis of variance of first minus second."""
    check_pair(first, second)
    return mean_squares(first.per_example - second.per_example)


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """The exact test of McNemar 1947 on whether each example is right, (N,) each, of one seed.

    Given b + c examples on which the two disagree, b is binomial with probability ½ among equals. It says nothing of
    new seeds: for several, `difference` does.
    """
    from scipy.special import bdtr

    right = [np.asarray(values) for values in (first, second)]
    if right[0].ndim != 1 or right[0].shape != right[1].shape or not all(np.isin(one, (0, 1)).all() for one in right):
        raise DataError("McNemar's test takes one 0 or 1 for each example, of the same examples for both")
    only_first, only_second = (int((one > other).sum()) for one, other in (right, right[::-1]))
    fewer = min(only_first, only_second)
    return McNemar(only_first, only_second, min(1.0, 2 * float(bdtr(fewer, only_first + only_second, 0.5))))


def check_level(name: str, value: float) -> None:
    """Raise DataError unless `value` lies between 0 and 1."""
    if not 0 < value < 1:
        raise DataError(f"{name} must lie between 0 and 1, not {value}")


def _counted(*samples: Samples) -> int:
    """Examples on which the score of any rests."""
    return int(np.any([one.denominators.sum(axis=0) > 0 for one in samples], axis=0).sum())


def _exp(values: Array) -> Array:
    """exp, ending at e⁷⁰⁰: an interval so wide says nothing either way."""
    return np.exp(np.minimum(values, 700.0))


def _over(squares: MeanSquares) -> str:
    seeds, examples = squares.shape
    if seeds == 1:
        return f"over {examples:,} examples of one seed; how much seeds vary is not in it"
    if squares.seeds == 0 and squares.rest == 0:
        return f"over {examples:,} examples; all {seeds} seeds are alike"
    return f"over {seeds} seeds and {examples:,} examples"
