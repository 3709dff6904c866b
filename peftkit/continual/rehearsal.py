"""Experience replay: batches that hold rows of earlier tasks, each answered by the head of its own task.

As in Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", rows of earlier tasks are trained on
beside those of the new one. Heads of earlier tasks stay as they were, so that replay holds the shared part to them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from peftkit.config import Run
from peftkit.continual.course import Stage
from peftkit.continual.heads import Tensors, digest, worn
from peftkit.continual.restored import restored_head
from peftkit.continual.sequence import Replay
from peftkit.data.files import Rows
from peftkit.data.mix import joined
from peftkit.errors import TrainingError, UsageError
from peftkit.prepare import Prepared
from peftkit.tasks.base import Batch, Encoded, Example
from peftkit.tasks.sequence_classification import SequenceClassification

if TYPE_CHECKING:
    from torch import Tensor, nn

TASK = "task"
"""The key of an example that says whose it is: 0 for the new task, and then the earlier ones in their order."""


@dataclass(frozen=True)
class Remembered:
    """An earlier task, and what of it is trained on again."""

    name: str
    task: SequenceClassification
    head: Tensors
    head_sha256: str
    outputs: int
    class_weights: tuple[float, ...]
    rows: Rows
    examples: list[Example]
    of: int
    """Rows that it was trained on."""


class Rehearsal(SequenceClassification):
    """The new task as it is trained on; for everything but the loss it is the task itself."""

    _remembered: tuple[Remembered, ...] = PrivateAttr(default=())

    @classmethod
    def of(cls, task: SequenceClassification, remembered: Sequence[Remembered]) -> Rehearsal:
        """The task beside what is remembered of earlier ones."""
        one = cls.model_construct(task.model_fields_set, **dict(task))
        one._remembered = tuple(remembered)
        return one

    def example_weight(self, example: Example, class_weights: Sequence[float]) -> float:
        if not example[TASK]:
            return super().example_weight(example, class_weights)
        one = self._remembered[example[TASK] - 1]
        return one.task.example_weight(example, one.class_weights)

    def summed_loss(self, model: nn.Module, batch: Batch, class_weights: Tensor) -> Tensor:
        own = _part(batch, 0)
        losses = [] if own is None else [super().summed_loss(model, own, class_weights)]
        for number, one in enumerate(self._remembered, start=1):
            if (part := _part(batch, number)) is not None:
                if part["labels"].ndim > 1:
                    part["labels"] = part["labels"][:, : one.outputs]  # what is behind them fills up the batch
                with worn(model, one.head):
                    losses.append(one.task.summed_loss(model, part, class_weights.new_tensor(one.class_weights)))
        return sum(losses[1:], start=losses[0])

    def check_heads(self) -> None:
        """Make sure that heads of earlier tasks are those that were trained with them.

        Raises:
            TrainingError: one changed.
        """
        for one in self._remembered:
            if digest(one.head) != one.head_sha256:
                raise TrainingError(
                    f"the head of task '{one.name}' changed while a later task was trained; this is a fault of "
                    "peftkit: please report it with `peftkit env`"
                )


def rehearse(stage: Stage, data: Prepared) -> tuple[Run, Prepared]:
    """The run and its data with rows of earlier tasks mixed into train; without replay, as they are.

    Raises:
        UsageError: a task has fewer rows than are to be remembered.
    """
    run, settings = stage.run, stage.course.sequence.replay
    if settings is None or not stage.earlier:
        return run, data
    assert isinstance(run.task, SequenceClassification)
    sizes = _sizes(settings, len(data.train), len(stage.earlier))
    remembered = [_remembered(one, size, settings) for one, size in zip(stage.earlier, sizes, strict=True)]
    parts = [data.train.encoded.examples, *(one.examples for one in remembered)]
    examples = [example | {TASK: number} for number, part in enumerate(parts) for example in part]
    train = replace(
        data.train,
        rows=joined([data.train.rows, *(one.rows for one in remembered)]),
        encoded=Encoded(examples, data.train.encoded.truncated),
    )
    told = ", ".join(f"{len(one.examples):,} from the {one.of:,} of {one.name}" for one in remembered)
    note = f"replay: beside {len(data.train):,} rows of {stage.name}, {told}"
    task = Rehearsal.of(run.task, remembered)
    return run.model_copy(update={"task": task}), replace(data, train=train, notes=(*data.notes, note))


def _sizes(settings: Replay, rows: int, tasks: int) -> list[int]:
    """Rows of each earlier task beside so many of the new one."""
    if settings.rows_per_task is not None:
        return [settings.rows_per_task] * tasks
    assert settings.share is not None
    total = max(tasks, round(rows * settings.share / (1 - settings.share)))
    return [total // tasks + (number < total % tasks) for number in range(tasks)]


def _remembered(stage: Stage, size: int, settings: Replay) -> Remembered:
    run, data = stage.run, stage.prepare()
    assert isinstance(run.task, SequenceClassification)
    known = len(data.train)
    if settings.rows_per_task is not None and size > known:
        raise UsageError(
            f"replay.rows_per_task is {size:,}, and task '{stage.name}' has {known:,} training rows; lower it"
        )
    chance = random.Random(f"replay/{stage.seed}/{stage.number}")
    # a share of many rows may be more than a small task has: then some are there more than once
    chosen = chance.sample(range(known), size) if size <= known else chance.choices(range(known), k=size)
    return Remembered(
        name=stage.name,
        task=run.task,
        head=restored_head(stage),
        head_sha256=stage.seal().head,
        outputs=len(data.head.labels),
        class_weights=data.class_weights,
        rows=data.train.rows.take(chosen),
        examples=[data.train.encoded.examples[index] for index in chosen],
        of=known,
    )


def _part(batch: Batch, number: int) -> dict[str, Any] | None:
    """The examples of one task, without the padding that is there for longer ones; None where there are none."""
    chosen = batch[TASK] == number
    if not bool(chosen.any()):
        return None
    part = {key: value[chosen] for key, value in batch.items() if key != TASK}
    longest = int(part["attention_mask"].sum(1).max())
    return {key: value if key == "labels" else value[:, :longest] for key, value in part.items()}
