"""How much of a score's spread comes from seeds, from examples, and from both together.

Every seed is tested on the same examples, so the design is crossed: y[s, n] = μ + seed s + example n + rest[s, n], all
but μ random. A mean's error over seeds alone, or over examples alone, leaves out one of the two. The same design is
known from radiology, where several readers judge the same cases (Obuchowski & Rockette 1995; Hillis 2007, Statistics in
Medicine 26, 596-619).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peftkit.bench.samples import Array

BISECTIONS = 60


@dataclass(frozen=True)
class Components:
    """Variances of one observation (one seed, one example), or of one paired difference."""

    seeds: float
    """Between seeds: the square of the spread that their scores would have over infinitely many examples."""
    examples: float
    """Between examples, in what the seeds have in common."""
    rest: float
    """Of one seed on one example beyond both."""
    several_seeds: bool = True
    """False where there was one seed: its part is unknown, and all the rest counts as that of examples."""


@dataclass(frozen=True, eq=False)
class MeanSquares:
    """The two-way analysis of variance without repetition, of (…, S, N); each array is (…).

    Expected: seeds N σ²ₛ + σ²ᵣ, examples S σ²ₙ + σ²ᵣ, rest σ²ᵣ. With one seed, `seeds` and `rest` are 0.
    """

    grand: Array
    """Mean over everything."""
    seeds: Array
    examples: Array
    rest: Array
    shape: tuple[int, int]
    """(S, N)."""

    @property
    def from_seeds(self) -> Array:
        """The part of the grand mean's variance with S − 1 degrees of freedom: MSₛ / (S N).

        Scores that are counts may be equal by chance, with two seeds often: where MSₛ is 0 and seeds yet differ on
        examples, MSᵣ stands for it, which is what it is expected to be where seeds differ in nothing else.
        """
        by_chance = self.seeds <= 1e-12 * self.rest
        return np.where(by_chance, self.rest, self.seeds) / (self.shape[0] * self.shape[1])

    @property
    def from_examples(self) -> Array:
        """The part with N − 1: max(MSₙ − MSᵣ, 0) / (S N)."""
        return np.maximum(self.examples - self.rest, 0.0) / (self.shape[0] * self.shape[1])

    @property
    def variance(self) -> Array:
        """Of the grand mean over new seeds and new examples: (MSₛ + max(MSₙ − MSᵣ, 0)) / (S N).

        The seeds' part keeps the rest, so that it is never below what the seeds' scores show; Hillis 2007, for one
        treatment, readers being seeds and cases examples.
        """
        return self.from_seeds + self.from_examples

    @property
    def components(self) -> Components:
        """The variances themselves; those that come out below 0 are 0. Of (S, N) only."""
        seeds, examples = self.shape
        of_seeds = max(float(self.seeds - self.rest), 0.0) / examples
        of_examples = float(self.from_examples) * examples
        return Components(of_seeds, of_examples, float(self.rest), seeds > 1)

    def critical(self, level: float) -> Array:
        """How many standard errors hold the mean with probability 1 − `level`, from both sides.

        The mean of Student's quantiles for S − 1 and N − 1 degrees of freedom, weighted by the parts of the variance
        that they belong to (Cochran & Cox 1957, Experimental Designs, section 4.14): at most `level` is outside,
        where Satterthwaite's degrees of freedom let out too much in the far tail that Holm's correction asks for.
        """
        from scipy.special import stdtrit

        seeds, examples = self.shape
        total = self.variance
        share = np.divide(self.from_seeds, total, out=np.zeros_like(total), where=total > 0)
        return -(share * stdtrit(max(seeds - 1, 1), level / 2) + (1 - share) * stdtrit(examples - 1, level / 2))

    def p_value(self, distance: Array | float = 0.0) -> Array:
        """Two-sided, of the hypothesis that the mean is `distance`: the level at which `critical` reaches it.

        1 where nothing varies and the mean is there; 0 where nothing varies and it is not.
        """
        from scipy.special import stdtr

        apart = np.abs(self.grand - distance)
        error = np.sqrt(self.variance)
        steps = np.divide(apart, error, out=np.where(apart > 0, np.inf, 0.0), where=error > 0)
        ends = [2 * stdtr(max(count - 1, 1), -steps) for count in self.shape]
        low, high = np.log(np.maximum(np.minimum(*ends), 1e-300)), np.log(np.maximum(np.maximum(*ends), 1e-300))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            beyond = self.critical(np.exp(middle)) > steps
            low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
        return np.where(np.isinf(steps), 0.0, np.exp(high))


def mean_squares(values: Array) -> MeanSquares:
    """(…, S, N), such as `Samples.per_example` or the difference of two of them."""
    seeds, examples = values.shape[-2:]
    by_seed = values.mean(axis=-1)
    grand = by_seed.mean(axis=-1)
    centred = values - by_seed[..., None]
    by_example = centred.mean(axis=-2)
    of_seeds = ((by_seed - grand[..., None]) ** 2).sum(axis=-1) * examples / max(seeds - 1, 1)
    of_examples = (by_example**2).sum(axis=-1) * seeds / (examples - 1)
    rest = centred - by_example[..., None, :]
    of_rest = np.einsum("...sn,...sn->...", rest, rest) / max((seeds - 1) * (examples - 1), 1)
    return MeanSquares(grand, of_seeds, of_examples, of_rest, (seeds, examples))
