"""Sets rows of train aside as dev, or as test, where the data has none; the same rows every time."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from peftkit.data.rows import Rows
from peftkit.errors import DataError


def carve(
    train: Rows, fraction: float, seed: int, label: str | None, group: str | None = None, split: str = "dev"
) -> tuple[Rows, Rows, str]:
    """(train, the split, what was done in plain words).

    Args:
        label: the column of classes to stratify by, if there is one; not with `group`.
        group: the column whose equal values stay together, such as the article that questions are about.
        split: what the rows are set aside as.

    Raises:
        DataError: too few rows, or too few groups, to set any aside.
    """
    if group is not None:
        chosen, how = _chosen_groups(train, group, fraction, seed)
    else:
        classes = _classes(train, label)
        chosen = _chosen(classes, fraction, seed)
        how = f", stratified by '{label}'" if classes[0] is not None else ""
        if not chosen:
            why = f"{len(train):,} training rows of {len(set(classes)):,} classes are too few to set some aside"
            raise DataError(f"{train.source}: {why}; give a {split} split, or more rows")
    kept = [index for index in range(len(train)) if index not in chosen]
    share = f"{100 * fraction:g} %{how}, seed {seed}"
    note = f"no {split} split: {len(chosen):,} of {len(train):,} training rows set aside ({share})"
    return train.take(kept), train.take(sorted(chosen)), note


def _chosen_groups(train: Rows, group: str, fraction: float, seed: int) -> tuple[set[int], str]:
    """The rows of whole groups that come nearest to the fraction, taken in random order; at least one group stays."""
    train.require(group)
    names = [json.dumps(record[group], sort_keys=True, default=str) for record in train.records]
    sizes = Counter(names)
    if len(sizes) < 2:
        raise DataError(
            f"{train.source}: '{group}' is the same in all rows, so no group of them can be set aside; "
            "give the split, or another group"
        )
    order = list(sizes)
    random.Random(seed).shuffle(order)
    wanted, taken, chosen = max(1, int(len(names) * fraction + 0.5)), 0, set[str]()
    for name in order:
        # a group that would overshoot by more than is still missing is left where it is
        if len(chosen) < len(order) - 1 and abs(wanted - taken - sizes[name]) < wanted - taken:
            chosen.add(name)
            taken += sizes[name]
    if not chosen:
        chosen = {min(order, key=sizes.__getitem__)}
    how = f", {len(chosen):,} of {len(sizes):,} groups of '{group}' whole"
    return {index for index, name in enumerate(names) if name in chosen}, how


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
