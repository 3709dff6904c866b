"""Chooses the solved examples that prompts show: rows of train, the same every time, and none that is scored."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from peftkit.config import Run
from peftkit.data.files import Rows
from peftkit.data.sources import Splits
from peftkit.errors import DataError, UsageError
from peftkit.methods.prompting import Prompting
from peftkit.tasks.prompted import Prompted


def with_demonstrations(run: Run, splits: Splits) -> Run:
    """The run with the demonstrations that `method.shots` asks for; any other run as it is.

    Raises:
        DataError: train has too few rows beside those that dev and test have too.
    """
    task, method = run.task, run.method
    if not isinstance(method, Prompting) or not isinstance(task, Prompted) or lacking(run) == 0:
        return run
    columns = task.demonstration_columns()
    scored = {_key(record, columns) for rows in (splits.dev, splits.test) if rows for record in rows.records}
    free = [i for i, record in enumerate(splits.train.records) if _key(record, columns) not in scored]
    if len(free) < method.shots:
        raise DataError(
            f"{splits.train.source}: method.shots is {method.shots}, and train has {len(free):,} rows that are "
            "neither in dev nor in test; lower it or give more rows"
        )
    rows = splits.train.take(free)
    rows.require(*columns)
    chosen = choose(_classes(rows, task.label_column()), method.shots, method.seed)
    shown = tuple({column: rows.records[index][column] for column in columns} for index in chosen)
    return run.model_copy(update={"task": task.model_copy(update={"demonstrations": shown})})


def lacking(run: Run) -> int:
    """The demonstrations that `method.shots` asks for and the task does not have yet."""
    shots = run.method.shots if isinstance(run.method, Prompting) else 0
    return max(0, shots - len(getattr(run.task, "demonstrations", ())))


def require_demonstrations(run: Run) -> None:
    """Refuse a run whose prompts would show less than it says."""
    if missing := lacking(run):
        raise UsageError(f"{missing} demonstrations are not chosen yet: run = with_demonstrations(run, splits) first")


def choose(classes: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """`count` positions: of each class equally many, as far as it goes, in an order drawn by `seed`."""
    chance = random.Random(seed)
    order = list(range(len(classes)))
    chance.shuffle(order)
    waiting: dict[Hashable, list[int]] = {}
    for index in order:
        waiting.setdefault(classes[index], []).append(index)
    chosen: list[int] = []
    while len(chosen) < count:
        for queue in waiting.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    chance.shuffle(chosen)
    return chosen


def _classes(rows: Rows, label: str | None) -> list[Hashable]:
    """The class of each row; one class where the task has none."""
    if label is None:
        return [None] * len(rows)
    rows.require(label)
    return [str(record[label]) for record in rows.records]


def _key(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    return json.dumps([record.get(column) for column in columns], sort_keys=True, default=str)
