"""Many tests at once: Holm's correction, methods that cannot be told apart, wins and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from peftkit.bench.samples import Array, Samples
from peftkit.bench.statistics import Difference, check_level, difference
from peftkit.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """One method against the reference, among others."""

    name: str
    difference: Difference
    p_adjusted: float
    """Holm's, over all comparisons with that reference."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every method against every other on one data set, the best mean first."""

    names: tuple[str, ...]
    means: Array
    """(K,)."""
    gains: Array
    """(K, K): by how much the row is better than the column."""
    p_values: Array
    """(K, K), two-sided; 1 on the diagonal."""
    p_adjusted: Array
    """(K, K): Holm's over all K (K − 1) / 2 pairs."""


@dataclass(frozen=True)
class Groups:
    """Methods that cannot be told apart."""

    members: tuple[tuple[str, ...], ...]
    """The largest sets of which no two differ, the one with the best method first; a method may be in several."""
    letters: dict[str, str]
    """The compact letter display: two methods share a letter where they are not told apart (Piepho 2004)."""


@dataclass(frozen=True)
class Record:
    """How one method fared against all others over all data sets."""

    name: str
    wins: int
    ties: int
    losses: int


def holm(p_values: ArrayLike) -> Array:
    """Adjusted p values of Holm 1979: the i-th smallest of m times (m − i + 1), never below the one before, at most 1.

    Among true hypotheses, any at all is rejected with probability of at most the level, whatever they have in common.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError("p values must be one row of numbers from 0 to 1")
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted


def against(reference: Samples, others: Mapping[str, Samples], confidence: float = 0.95) -> tuple[Comparison, ...]:
    """Each of `others` minus `reference`, in their order, with Holm's correction over all of them."""
    found = {name: difference(samples, reference, confidence) for name, samples in others.items()}
    adjusted = holm([one.p_value for one in found.values()])
    return tuple(Comparison(name, one, float(p)) for (name, one), p in zip(found.items(), adjusted, strict=True))


def all_pairs(methods: Mapping[str, Samples]) -> Pairs:
    """Every pair of `methods`, which share seeds and examples, tested by `difference`."""
    lower = {samples.lower_is_better for samples in methods.values()} == {True}
    names = sorted(methods, key=lambda name: (methods[name].mean if lower else -methods[name].mean, name))
    count = len(names)
    gains, raw, adjusted = np.zeros((count, count)), np.ones((count, count)), np.ones((count, count))
    pairs = list(combinations(range(count), 2))
    found = [difference(methods[names[row]], methods[names[column]]) for row, column in pairs]
    for (row, column), one, p in zip(pairs, found, holm([one.p_value for one in found]), strict=True):
        gains[row, column], gains[column, row] = one.gain, -one.gain
        raw[row, column] = raw[column, row] = one.p_value
        adjusted[row, column] = adjusted[column, row] = p
    return Pairs(tuple(names), np.array([methods[name].mean for name in names]), gains, raw, adjusted)


def groups(names: Sequence[str], p_matrix: ArrayLike, level: float = 0.05) -> Groups:
    """The largest sets of `names` of which no pair has p ≤ `level`: maximal cliques, by Bron & Kerbosch 1973.

    `p_matrix` (K, K) is symmetric and adjusted already, such as `Pairs.p_adjusted`; names come best first.
    """
    check_level("level", level)
    values = np.asarray(p_matrix, dtype=np.float64)
    if values.shape != (len(names), len(names)) or not (values == values.T).all() or len(set(names)) < len(names):
        raise DataError(f"p values of {len(names)} different methods must be a symmetric square, not {values.shape}")
    near = values > level
    neighbours = [set(np.flatnonzero(row).tolist()) - {index} for index, row in enumerate(near)]
    cliques = sorted(_cliques(set(), set(range(len(names))), set(), neighbours)) if len(names) else []
    letters = {
        name: "".join(_letter(index) for index, one in enumerate(cliques) if place in one)
        for place, name in enumerate(names)
    }
    return Groups(tuple(tuple(names[place] for place in one) for one in cliques), letters)


def win_tie_loss(data_sets: Mapping[str, Pairs], level: float = 0.05) -> tuple[Record, ...]:
    """Over all data sets and opponents there, how often each method is better, not told apart, or worse at `level`.

    p values are adjusted within a data set. Most wins first, then fewest losses.
    """
    check_level("level", level)
    counts: dict[str, list[int]] = {}
    for pairs in data_sets.values():
        told = pairs.p_adjusted <= level
        wins, losses = (told & (pairs.gains > 0)).sum(axis=1), (told & (pairs.gains < 0)).sum(axis=1)
        for name, won, lost in zip(pairs.names, wins, losses, strict=True):
            so_far = counts.setdefault(name, [0, 0, 0])
            for place, more in enumerate((won, len(pairs.names) - 1 - won - lost, lost)):
                so_far[place] += int(more)
    records = [Record(name, *found) for name, found in counts.items()]
    return tuple(sorted(records, key=lambda one: (-one.wins, one.losses, one.name)))


def _cliques(chosen: set[int], open_: set[int], done: set[int], neighbours: list[set[int]]) -> list[list[int]]:
    """Every maximal clique that holds `chosen`, more of `open_`, and none of `done`; each sorted."""
    if not open_ and not done:
        return [sorted(chosen)]
    pivot = max(open_ | done, key=lambda one: len(neighbours[one] & open_))
    found = []
    for one in sorted(open_ - neighbours[pivot]):
        found += _cliques(chosen | {one}, open_ & neighbours[one], done & neighbours[one], neighbours)
        open_, done = open_ - {one}, done | {one}
    return found


def _letter(index: int) -> str:
    """a … z, then a1 … z1, a2 …"""
    turn, place = divmod(index, 26)
    return chr(ord("a") + place) + (str(turn) if turn else "")
