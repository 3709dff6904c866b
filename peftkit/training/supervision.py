"""How much of a batch is learnt from."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.data.collate import IGNORED
from peftkit.errors import TrainingError
from peftkit.prepare import Prepared
from peftkit.tasks.base import Task


def supervision(task: Task, data: Prepared, batch: Sequence[int], step: int) -> float:
    """The weight of a batch's examples in the loss, which is their mean.

    Raises:
        TrainingError: there is nothing to learn in it.
    """
    examples, weights = data.train.encoded.examples, data.class_weights
    weight = float(sum(task.example_weight(examples[index], weights) for index in batch))
    if not weight:
        places = ", ".join(data.train.where(index) for index in list(batch)[:3])
        raise TrainingError(
            f"nothing to learn at step {step}: every label of its batch is masked ({IGNORED}), e.g. {places}; remove "
            "such rows or raise training.batch_size"
        )
    return weight
