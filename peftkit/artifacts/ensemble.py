"""Several runs as one model: the mean of what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.store import SavedRun, load_run
from peftkit.errors import UsageError
from peftkit.tasks.base import Batch, Task
from peftkit.tasks.outputs import together

if TYPE_CHECKING:
    from torch import Tensor

OF_TRAINING = frozenset({"data", "loss", "metrics", "augmentation", "labels"})
"""Of a task's settings, those that may differ; the labels themselves are compared."""


def load_runs(folders: Sequence[str | Path]) -> SavedRun:
    """One run, or several as one.

    Raises:
        UsageError: their tasks, labels or tokenizers differ, or the task has no mean of predictions.
    """
    members = [load_run(folder) for folder in folders]
    return members[0] if len(members) == 1 else ensemble(members)


def ensemble(members: Sequence[SavedRun]) -> SavedRun:
    """The runs as one that gives the mean of their probabilities, or of their numbers.

    It can predict and be evaluated; in all else it is the first of them. Typically they are one run with other seeds.
    Backbones and methods may differ as long as texts become the same token ids.

    Raises:
        UsageError: as for `load_runs`.
    """
    from torch import nn

    first = members[0]
    if not first.run.task.averages:
        raise UsageError(
            f"the predictions of task '{first.run.task.kind}' have no mean: each model would write, "
            "or mark, another text; predict with one run"
        )
    for other in members[1:]:
        _check_alike(first, other)
    models: Any = nn.ModuleList([one.model for one in members])
    return dataclasses.replace(
        first, model=models, run=first.run.model_copy(update={"task": _averaged(first.run.task)})
    )


def _averaged(task: Task) -> Task:
    """The task whose logits are those of the mean of several models', which come as one list."""
    kind: Any = type(task)

    class Averaged(kind):
        def logits(self, model: Any, batch: Batch) -> Tensor:
            return together(self.outputs, [kind.logits(self, member, batch) for member in model])

    made: Task = Averaged.model_construct(**{name: getattr(task, name) for name in kind.model_fields})
    return made


def _check_alike(one: SavedRun, other: SavedRun) -> None:
    pair = f"{one.folder} and {other.folder}"
    settings = [run.run.task.model_dump(exclude=set(OF_TRAINING)) for run in (one, other)]
    if differing := sorted(name for name in {*settings[0], *settings[1]} if _differ(settings, name)):
        name = differing[0]
        values = " and ".join(repr(one.get(name)) for one in settings)
        raise UsageError(f"{pair} have different tasks (task.{name}: {values}); combine runs of one task")
    if one.head.labels != other.head.labels:
        ours, theirs = (", ".join(run.head.labels[:8]) for run in (one, other))
        raise UsageError(f"{pair} have different labels ({ours}; {theirs}); combine runs with the same in one order")
    if _tokenizer(one) != _tokenizer(other):
        raise UsageError(f"{pair} have different tokenizers; combine runs whose backbones read texts alike")


def _differ(settings: Sequence[dict[str, Any]], name: str) -> bool:
    return bool(settings[0].get(name) != settings[1].get(name))


def _tokenizer(saved: SavedRun) -> str:
    """All that decides which ids a text becomes."""
    tokenizer: Any = saved.tokenizer
    fast: str = tokenizer.backend_tokenizer.to_str()
    return fast
