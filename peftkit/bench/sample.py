"""A few of many training rows, drawn by a seed: the same for every method."""

from __future__ import annotations

import json
import random
from collections import defaultdict

from peftkit.data.rows import Rows
from peftkit.errors import UsageError


def sampled(train: Rows, count: int, label: str | None, seed: int) -> Rows:
    """`count` rows of each class, or in all where there are no classes, in their old order.

    Raises:
        UsageError: there are not so many of a class.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(train.records):
        groups["" if label is None else json.dumps(record.get(label), default=str)].append(index)
    few = min(groups, key=lambda name: len(groups[name]))
    if len(groups[few]) < count:
        what = f"of class {few}" if label is not None else "in all"
        raise UsageError(f"{train.source}: {len(groups[few]):,} rows {what}, and a budget of {count:,}; lower it")
    chance = random.Random(f"{seed}/{count}")
    return train.take(sorted(index for name in sorted(groups) for index in chance.sample(groups[name], count)))


def fewer(rows: Rows, most: int | None) -> Rows:
    """`most` of the rows, drawn once for all, in their old order; all of them where there are no more."""
    return rows if most is None or len(rows) <= most else sampled(rows, most, None, 0)
