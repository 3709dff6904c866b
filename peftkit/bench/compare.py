"""The same cells in two folders of results, as before and after a change of versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.bench import numbers
from peftkit.bench.analysis import LEVEL
from peftkit.bench.families import holm
from peftkit.bench.numbers import Scale
from peftkit.bench.pairing import on_shared_seeds
from peftkit.bench.provenance import NOT_RECORDED, described
from peftkit.bench.results import Entry, Results, read
from peftkit.bench.statistics import Difference, difference
from peftkit.tables import table

Names = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One cell that both folders have: the second minus the first."""

    backbone: str
    data: str
    budget: str
    method: str
    headline: str
    seeds: int
    """That both have; the difference is paired over them and the test examples."""
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    """Holm's, over all cells."""
    identical: bool
    """Every answer counts for the same in both."""
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """`the same`, `better`, `worse`, or `not separable`."""
        if self.identical:
            return "the same"
        if self.p_adjusted > LEVEL:
            return "not separable"
        return "better" if (self.difference > 0) != self.lower_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """Two folders of results."""

    folders: tuple[str, str]
    changes: tuple[Change, ...]
    only_first: tuple[Names, ...]
    only_second: tuple[Names, ...]
    not_comparable: dict[str, str]
    """Cells that both have, and why they cannot be paired."""
    differing: dict[str, tuple[str, str]]
    """What is not the same in both, such as versions → (first, second)."""
    damaged: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"changes": [asdict(one) | {"verdict": one.verdict} for one in self.changes]}


def compare(first: Path, second: Path) -> Comparison:
    """Paired differences of every cell that both folders have final runs of.

    Within a folder, versions may be mixed: what differs between the two is told.

    Raises:
        UsageError: a folder without results.
        DataError: results that cannot be compared.
    """
    both = [read(folder, mixed=True) for folder in (first, second)]
    cells = [_cells(results) for results in both]
    shared = [names for names in cells[0] if names in cells[1]]
    found: list[tuple[Names, Difference]] = []
    reasons = {}
    for names in shared:
        old, new = (one[names] for one in cells)
        if reason := _reason(old, new):
            reasons[", ".join(names)] = reason
        elif pair := on_shared_seeds(new, old):
            found.append((names, difference(*pair)))
    adjusted = holm([one.p_value for _, one in found])
    changes = [
        _change(names, cells[0][names], cells[1][names], one, float(p))
        for (names, one), p in zip(found, adjusted, strict=True)
    ]
    only = [tuple(names for names in cells[at] if names not in cells[1 - at]) for at in (0, 1)]
    damaged = [f"{results.folder}/{name}" for results in both for name in results.damaged]
    folders = (str(first), str(second))
    return Comparison(folders, tuple(changes), only[0], only[1], reasons, _differing(both), tuple(damaged))


def shown(found: Comparison) -> str:
    """For a terminal."""
    rows = [["cell", "figure", "seeds", *found.folders, "change", "95 % interval", "p (Holm)", ""]]
    for one in found.changes:
        scale = Scale(not one.lower_is_better and 0 <= one.first <= 1 and 0 <= one.second <= 1)
        place = " · ".join((one.data, one.backbone, one.budget, one.method))
        figures = [scale.score(one.first), scale.score(one.second), scale.change(one.difference)]
        tested = [scale.change_between(one.low, one.high), numbers.probability(one.p_adjusted)]
        figures += ["", ""] if one.identical else tested
        rows.append([place, one.headline, str(one.seeds), *figures, one.verdict])
    lines = [table(rows)] if found.changes else ["no cell has final runs in both"]
    for folder, only in zip(found.folders, (found.only_first, found.only_second), strict=True):
        lines += [f"only in {folder}: {', '.join(names)}" for names in only]
    lines += [f"not comparable: {name}: {why}" for name, why in found.not_comparable.items()]
    lines += [f"differs: {name}: {old} → {new}" for name, (old, new) in found.differing.items()]
    lines += [f"damaged, and not counted: {name}" for name in found.damaged]
    return "\n".join(lines)


def _cells(results: Results) -> dict[Names, Entry]:
    return {(*block.place, entry.method): entry for block in results.blocks for entry in block.scored}


def _reason(old: Entry, new: Entry) -> str:
    """Why two cells cannot be paired; empty where they can."""
    assert old.samples is not None and new.samples is not None
    headlines = [entry.runs[0].test.headline for entry in (old, new) if entry.runs[0].test]
    if len(set(headlines)) > 1 or old.samples.lower_is_better != new.samples.lower_is_better:
        return f"scored by {headlines[0]} and by {headlines[1]}"
    if old.samples.numerators.shape[1] != new.samples.numerators.shape[1] or old.per_example != new.per_example:
        return "the test examples are not the same"
    if not set(old.seeds) & set(new.seeds):
        return "no seed is in both"
    if not old.per_example and len(set(old.seeds) & set(new.seeds)) == 1:
        return f"one seed is in both, and {headlines[0]} is no ratio of sums over examples"
    return ""


def _change(names: Names, old: Entry, new: Entry, found: Difference, p_adjusted: float) -> Change:
    pair = on_shared_seeds(new, old)
    assert pair is not None and old.runs[0].test is not None
    now, before = pair
    same = bool((now.numerators == before.numerators).all() and (now.denominators == before.denominators).all())
    return Change(
        *names,
        headline=old.runs[0].test.headline,
        seeds=now.seeds,
        first=before.mean,
        second=now.mean,
        difference=found.mean,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        p_adjusted=p_adjusted,
        identical=same,
        lower_is_better=now.lower_is_better,
    )


def _differing(both: Sequence[Results]) -> dict[str, tuple[str, str]]:
    """What is described otherwise, or in more than one way, in the two."""
    told = [_all_described(results) for results in both]
    names = dict.fromkeys(name for one in told for name in one)
    pairs = {name: (told[0].get(name, NOT_RECORDED), told[1].get(name, NOT_RECORDED)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _all_described(results: Results) -> dict[str, str]:
    counted = [described(run) for block in results.blocks for run in block.runs]
    names = dict.fromkeys(name for one in counted for name in one)
    return {name: " and ".join(sorted({one.get(name, NOT_RECORDED) for one in counted})) for name in names}
