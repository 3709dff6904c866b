"""What differences a comparison of so many seeds and examples can show."""

from __future__ import annotations

import numpy as np

from peftkit.bench.samples import Array
from peftkit.bench.statistics import check_level
from peftkit.bench.variance import BISECTIONS, Components, MeanSquares
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
    needed, error = _planned(components, seeds, examples, level / comparisons)
    return _found(needed, error, abs(effect)) if error > 0 else float(effect != 0)


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
    needed, error = _planned(components, seeds, examples, level / comparisons)
    if error == 0:
        return 0.0
    low, high = 0.0, error
    while _found(needed, error, high) < power:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _found(needed, error, middle) >= power else (middle, high)
    return high


def _found(needed: Array, error: float, effect: float) -> float:
    from scipy.special import ndtr

    return float((ndtr((effect - needed) / error) + ndtr((-effect - needed) / error)).mean())


def _planned(components: Components, seeds: int, examples: int, level: float) -> tuple[Array, float]:
    """Differences that will be needed at `level`, all equally probable, and the true standard error."""
    from scipy.special import chdtri

    if seeds < 1 or examples < 2:
        raise DataError(f"{seeds} seeds and {examples} examples: one seed and two examples at least")
    if seeds > 1 and not components.several_seeds:
        raise DataError("how much seeds differ cannot be known from one seed: run a second, or plan with one")
    # one seed's luck looks like an effect: it is in the error of the difference and not in what the test sees
    variance = components.seeds / seeds + components.examples / examples + components.rest / (seeds * examples)
    seed_square, rest = (examples * components.seeds + components.rest, components.rest) if seeds > 1 else (0.0, 0.0)
    probable = np.ones(1)
    if seeds > 1:
        probable = chdtri(seeds - 1, (np.arange(NODES) + 0.5) / NODES) / (seeds - 1)
    same = np.ones_like(probable)
    example_square = seeds * components.examples + components.rest
    squares = MeanSquares(0 * same, seed_square * probable, example_square * same, rest * same, (seeds, examples))
    return squares.critical(level) * np.sqrt(squares.variance), float(np.sqrt(variance))
