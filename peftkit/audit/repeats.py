"""Rows that are there twice: within a split, and across splits.

Two rows are the same when their texts are, but for white space. Digests of 64 bits find them in little memory, and the
texts themselves confirm.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.audit.findings import KEPT, Finding, finding, found_in
from peftkit.audit.texts import digests, row_key
from peftkit.data.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Hashed:
    """A split with the digests of its rows."""

    split: str
    rows: Rows
    columns: Sequence[str]
    digests: array[int]

    def key(self, index: int) -> str:
        return row_key(self.rows.records[index], self.columns)


def hashed(split: str, rows: Rows, columns: Sequence[str]) -> Hashed:
    """A split, ready for being compared."""
    return Hashed(split, rows, columns, digests(rows, columns))


def repeated(split: Hashed) -> dict[int, int]:
    """From each row that repeats an earlier one to the first of them."""
    import numpy as np

    numbers = _numbers(split)
    order = np.argsort(numbers, kind="stable")
    found = numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
    firsts = np.repeat(order[starts], np.diff([*starts, len(order)]))
    pairs = zip(order[order != firsts].tolist(), firsts[order != firsts].tolist(), strict=True)
    return {later: first for later, first in sorted(pairs) if _same(split.key(later), split.key(first))}


def shared(one: Hashed, other: Hashed) -> dict[int, int]:
    """From each row of `one` that is in `other` too to the first of those."""
    import numpy as np

    wanted, found = _numbers(one), _numbers(other)
    order = np.argsort(found, kind="stable")
    at = np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)
    hits = np.flatnonzero(found[order][at] == wanted)
    pairs = zip(hits.tolist(), order[at[hits]].tolist(), strict=True)
    return {index: first for index, first in pairs if _same(one.key(index), other.key(first))}


def duplicate_findings(split: Hashed, duplicates: dict[int, int]) -> Iterator[Finding]:
    """Rows that repeat an earlier one."""
    if duplicates:
        what = f"{len(duplicates):,} of {len(split.rows):,} rows repeat an earlier one"
        yield finding(
            "duplicates",
            split.split,
            len(duplicates),
            what,
            _pairs(split.rows, split.rows, duplicates),
            len(duplicates) / len(split.rows),
        )


def conflict_findings(split: Hashed, duplicates: dict[int, int], labels: Sequence[Any]) -> Iterator[Finding]:
    """Texts with several labels; every row of such a text counts."""
    groups: dict[int, list[int]] = {}
    for later, first in duplicates.items():
        groups.setdefault(first, [first]).append(later)
    indices = sorted(i for group in groups.values() if len({str(labels[j]) for j in group}) > 1 for i in group)
    what = f"{len(indices):,} of {len(split.rows):,} rows have a text with several labels"
    yield from found_in("conflicting-labels", split.split, split.rows, indices, what)


def overlap_findings(name: str, split: Hashed, other: Hashed, by_length: bool) -> Iterator[Finding]:
    """Rows of one split whose text is in another; their share is of the rows, or `by_length` of the text."""
    both = shared(split, other)
    if both:
        what = f"{len(both):,} of {len(split.rows):,} rows are in {other.split} too"
        share = len(both) / len(split.rows)
        if by_length:  # the headings of an encyclopedia are many of its lines, and little of its text
            share = sum(len(split.key(i)) for i in both) / sum(len(split.key(i)) for i in range(len(split.rows)))
        yield finding(name, split.split, len(both), what, _pairs(split.rows, other.rows, both), share)


def _same(one: str, other: str) -> bool:
    """Rows without any text are told as such, and not as repeating one another."""
    return one == other and bool(one.strip("\0"))


def _pairs(rows: Rows, others: Rows, pairs: dict[int, int]) -> list[str]:
    """Both places of each pair."""
    first = list(pairs.items())[:KEPT]
    if rows.source == others.source:
        unit = "line" if rows.by_line else "row"
        return [f"{rows.where(index)} = {unit} {others.places[other]}" for index, other in first]
    return [f"{rows.where(index)} = {others.where(other)}" for index, other in first]


def _numbers(split: Hashed) -> NDArray[Any]:
    import numpy as np

    return np.frombuffer(split.digests, dtype=np.uint64)
