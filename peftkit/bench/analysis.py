"""What the results of one block say: intervals, paired differences from the references, who cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from peftkit.bench.families import Groups, Pairs, groups, holm
from peftkit.bench.pairing import all_pairs, comparable, on_shared_seeds
from peftkit.bench.power import smallest_detectable
from peftkit.bench.results import Block, Entry
from peftkit.bench.statistics import Difference, Equivalence, Interval, difference, equivalence, interval

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Against:
    """A method minus a reference, paired over seeds and examples."""

    difference: Difference
    equivalence: Equivalence
    seeds: int
    """That both have."""
    p_adjusted: float
    """Holm's, of no difference, over all methods of the block against this reference."""
    p_equivalent: float
    """Holm's, of a difference of the margin or more, over the same."""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, each maybe `within the margin`; `as good as`, which is a test; or `not separable`."""
        equal = self.p_equivalent <= LEVEL
        if self.p_adjusted > LEVEL:
            return "as good as" if equal else "not separable"
        word = "better" if self.difference.gain > 0 else "worse"
        return f"{word} within the margin" if equal else word


@dataclass(frozen=True)
class Row:
    """A method of a block with what was found of it."""

    entry: Entry
    mean: float | None = None
    interval: Interval | None = None
    """None without a score, or where one seed of a score that is no ratio of sums leaves nothing to estimate it by."""
    over: str = ""
    """What the interval is over."""
    against: Mapping[str, Against] = field(default_factory=dict)
    """By reference."""
    letters: str = ""
    """Methods of a block that share a letter are not separable."""


@dataclass(frozen=True)
class Analysis:
    """A block and all that follows from it."""

    block: Block
    rows: tuple[Row, ...]
    """The best mean first; those without a score last."""
    pairs: Pairs
    groups: Groups
    margin: float
    """Of "as good as", in units of the score."""
    detectable: Mapping[str, tuple[float, float]]
    """Reference → the smallest true difference from it that is found with a probability of 80 %: at the first step of
    Holm's correction, and as the only comparison."""

    def row(self, method: str) -> Row | None:
        """The row of a method with a score."""
        return next((row for row in self.rows if row.entry.method == method and row.mean is not None), None)

    def is_best(self, row: Row) -> bool:
        """Whether no mean is better."""
        return row.mean is not None and row.mean == self.scored[0].mean

    @property
    def scored(self) -> tuple[Row, ...]:
        """Rows with a score."""
        return tuple(row for row in self.rows if row.mean is not None)


def analyse(block: Block, references: Sequence[str], margin: float) -> Analysis:
    """Every figure of a block.

    Args:
        margin: of "as good as": absolute for shares, else a share of the reference's mean score.
    """
    fitting = comparable(block.entries)
    pairs = all_pairs(fitting)
    together = groups(pairs.names, pairs.p_adjusted, LEVEL)
    named = {entry.method: entry for entry in fitting}
    present = [name for name in references if name in named]
    units = margin if block.is_share else margin * _scale(block, present)
    against = {name: _against(named[name], fitting, units) for name in present}
    rows = [
        _row(
            entry,
            {name: found[entry.method] for name, found in against.items() if entry.method in found},
            together.letters.get(entry.method, ""),
        )
        for entry in block.entries
    ]
    sign = 1 if block.lower_is_better else -1
    ordered = sorted(rows, key=lambda row: (row.mean is None, sign * (row.mean or 0.0), row.entry.method))
    detectable = {name: _detectable(list(found.values()), fitting) for name, found in against.items() if found}
    return Analysis(block, tuple(ordered), pairs, together, units, detectable)


def _row(entry: Entry, against: Mapping[str, Against], letters: str) -> Row:
    if entry.samples is None:
        return Row(entry)
    seeds = len(entry.seeds)
    if entry.per_example:
        found = interval(entry.samples)
        return Row(entry, found.mean, found, found.how, against, letters)
    if seeds == 1:
        return Row(entry, entry.samples.mean, None, "one seed, and no score of single examples: no interval", {}, "")
    if entry.unvaried:
        told = "every seed gives the same, and no single example has a score: no interval"
        return Row(entry, entry.samples.mean, None, told, against, letters)
    found = interval(entry.samples)
    return Row(entry, found.mean, found, f"over {seeds} seeds alone: Student's t", against, letters)


def _against(reference: Entry, entries: Sequence[Entry], margin: float) -> dict[str, Against]:
    pairs = {}
    for entry in entries:
        shared = on_shared_seeds(entry, reference)
        if entry is not reference and shared and not (entry.unvaried and reference.unvaried):
            pairs[entry.method] = shared
    found = {name: difference(*pair) for name, pair in pairs.items()}
    equal = {name: equivalence(*pair, margin) for name, pair in pairs.items()}
    apart = holm([one.p_value for one in found.values()])
    near = holm([one.p_equivalent for one in equal.values()])
    return {
        name: Against(one, equal[name], pairs[name][0].seeds, float(p), float(q))
        for (name, one), p, q in zip(found.items(), apart, near, strict=True)
    }


def _scale(block: Block, references: Sequence[str]) -> float:
    """The mean score of the first reference, or of all where there is none; 1 where that is 0."""
    means = {entry.method: entry.samples.mean for entry in block.scored if entry.samples}
    chosen = [means[name] for name in references[:1]] or list(means.values())
    return abs(fmean(chosen)) or 1.0 if chosen else 1.0


def _detectable(found: Sequence[Against], entries: Sequence[Entry]) -> tuple[float, float]:
    """Of the comparison whose standard error is the median."""
    typical = sorted(found, key=lambda one: one.difference.standard_error)[len(found) // 2]
    examples = next(entry.samples.examples for entry in entries if entry.samples)
    components = typical.difference.components
    corrected, alone = (
        smallest_detectable(components, typical.seeds, examples, POWER, LEVEL, count) for count in (len(found), 1)
    )
    return corrected, alone
