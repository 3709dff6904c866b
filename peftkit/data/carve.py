"""Sets rows of train aside as dev, where the data has none; the same rows every time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from peftkit.data.files import Rows
from peftkit.errors import DataError


def carve(train: Rows, fraction: float, seed: int, label: str | None) -> tuple[Rows, Rows, str]:
    """(train, dev, what was done in plain words); stratified by `label` where it is a column of classes.

    Raises:
        DataError: too few rows to set any aside.
    """
    classes = _classes(train, label)
    chosen = _chosen(classes, fraction, seed)
    total = f"{len(train):,} training rows"
    if not chosen:
        why = f"{total} of {len(set(classes)):,} classes are too few to set some aside"
        raise DataError(f"{train.source}: {why}; give a dev split, or more rows")
    how = f", stratified by '{label}'" if classes[0] is not None else ""
    share = f"{100 * fraction:g} %{how}, seed {seed}"
    kept = [index for index in range(len(train)) if index not in chosen]
    note = f"no dev split: {len(chosen):,} of {total} set aside ({share})"
    return train.take(kept), train.take(sorted(chosen)), note


def _classes(train: Rows, label: str | None) -> list[Hashable]:
    """The class of each row; one class, None, where there is nothing to stratify by."""
    if label is not None:
        train.require(label)
        values = [record[label] for record in train.records]
        if all(isinstance(value, str | int) for value in values):
            return values
    return [None] * len(train)


def _chosen(classes: Sequence[Hashable], fraction: float, seed: int) -> set[int]:
    """The rows to set aside; every class keeps at least one."""
    sizes = Counter(classes)
    wanted = max(1, int(len(classes) * fraction + 0.5))
    left = _allotment(sizes, min(wanted, len(classes) - len(sizes)))
    order = list(range(len(classes)))
    random.Random(seed).shuffle(order)
    chosen = set()
    for index in order:
        if left[classes[index]]:
            left[classes[index]] -= 1
            chosen.add(index)
    return chosen


def _allotment(sizes: Mapping[Hashable, int], wanted: int) -> dict[Hashable, int]:
    """How many rows of each class make up `wanted`: in proportion, by largest remainder."""
    total = sum(sizes.values())
    allotted = {one: min(size * wanted // total, size - 1) for one, size in sizes.items()}
    while short := wanted - sum(allotted.values()):
        roomy = [one for one, size in sizes.items() if allotted[one] < size - 1]
        roomy.sort(key=lambda one: allotted[one] - sizes[one] * wanted / total)
        for one in roomy[:short]:
            allotted[one] += 1
    return allotted
