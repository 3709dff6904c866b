"""What differences a comparison of so many seeds and examples can show."""

from __future__ import annotations

import numpy as np

from peftkit.bench.statistics import check_level
from peftkit.bench.variance import Components, MeanSquares
from peftkit.errors import DataError

NODES = 400
"""Values of the seeds' mean square, equally probable, that power is averaged over."""


def power(
    components: Components, effect: float, seeds: int, examples: int, level: float = 0.05, comparisons: int = 1
) -> float:
    """The probability that `difference` finds a true difference of `effect` at `level`.

    P(|d| > critical · standard error), with d normal around `effect` and MSₛ a scaled χ² of S − 1 degrees of freedom,
    averaged over its quantiles; the examples' part counts as known. `components` are those of paired differences:
    of a pilot, `Difference.components`. With `comparisons`, at level / comparisons: Holm's first step.
    Raises DataError where several seeds are planned from components of one.
    """
    check_level("level", level)
    squares, error = _planned(components, seeds, examples)
    if error == 0:
        return float(effect != 0)
    return float(_found(squares, error, abs(effect), level / comparisons))


def smallest_detectable(
    components: Components,
    seeds: int,
    examples: int,
    power: float = 0.8,
    level: float = 0.05,
    comparisons: int = 1,
) -> float:
    """The smallest true difference that is found with probability `power`; see the function of that name."""
    check_level("level", level)
    check_level("power", power)
    squares, error = _planned(components, seeds, examples)
    if error == 0:
        return 0.0
    low, high = 0.0, error
    while _found(squares, error, high, level / comparisons) < power:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        enough = _found(squares, error, middle, level / comparisons) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def _found(squares: MeanSquares, error: float, effect: float, level: float) -> float:
    from scipy.special import ndtr

    needed = squares.critical(level) * np.sqrt(squares.variance)
    return float((ndtr((effect - needed) / error) + ndtr((-effect - needed) / error)).mean())


def _planned(components: Components, seeds: int, examples: int) -> tuple[MeanSquares, float]:
    """Mean squares that the plan may show, all equally probable, and the true standard error."""
    from scipy.special import chdtri

    if seeds < 1 or examples < 2:
        raise DataError(f"{seeds} seeds and {examples} examples: one seed and two examples at least")
    if seeds > 1 and not components.several_seeds:
        raise DataError("how much seeds differ cannot be known from one seed: run a second, or plan with one")
    seed_square = examples * components.seeds + components.rest if seeds > 1 else 0.0
    rest = components.rest if seeds > 1 else 0.0
    example_square = seeds * components.examples + components.rest
    variance = (seed_square + example_square - rest) / (seeds * examples)
    if seeds == 1:
        variance += components.seeds  # one seed's luck looks like an effect, and the test cannot see it
    probable = np.ones(1)
    if seeds > 1:
        probable = chdtri(seeds - 1, (np.arange(NODES) + 0.5) / NODES) / (seeds - 1)
    same = np.ones_like(probable)
    squares = MeanSquares(0 * same, seed_square * probable, example_square * same, rest * same, (seeds, examples))
    return squares, float(np.sqrt(variance))
