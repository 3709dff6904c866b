"""Scores a model on a split of a task. Never knows how the model was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.data.collate import collate
from peftkit.metrics.extra import extra_values
from peftkit.tasks.base import Prediction, Scores, Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.prepare import Prepared, Split


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the predictions they were computed from, in the order of the split."""

    split: Split
    scores: Scores
    predictions: list[Prediction]


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    data: Prepared,
    accelerator: Accelerator,
    batch_size: int = 64,
    metrics: Sequence[Any] = (),
) -> Evaluation:
    """Predict a whole split, over all processes, and score it.

    Args:
        model: in any mode; its mode is kept.
        metrics: `evaluate` modules beside those that `task.metrics` names.
    """
    predictions = predict_examples(
        model, task, split.encoded.examples, data.labels, data.pad_id, accelerator, batch_size
    )
    scores = task.score(predictions, split.rows, data.labels)
    extra = (*task.metrics, *metrics)
    if extra:
        inputs = task.metric_inputs(predictions, split.rows, data.labels)
        scores = dataclasses.replace(scores, values=scores.values | extra_values(extra, *inputs, known=scores.values))
    return Evaluation(split, scores, predictions)


def majority(task: Task, split: Split, data: Prepared) -> Evaluation:
    """The score of always answering with the most frequent label of train."""
    predictions = task.majority(data.train.rows, split.rows, data.labels)
    return Evaluation(split, task.score(predictions, split.rows, data.labels), predictions)


def predict_examples(
    model: nn.Module,
    task: Task,
    examples: Sequence[dict[str, Any]],
    labels: Sequence[str],
    pad_id: int,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> list[Prediction]:
    """Predictions in the order of `examples`, each exactly once whatever the number of processes.

    Batches hold examples of similar length; every process takes every n-th batch.
    """
    import torch
    from accelerate.utils import gather_object

    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.to(accelerator.device).eval()
    found: list[tuple[int, Prediction]] = []
    with torch.no_grad(), accelerator.autocast():
        for indices in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = collate([examples[index] for index in indices], pad_id, accelerator.device)
            found.extend(zip(indices, task.predict(model, batch, labels), strict=True))
    model.train(was_training)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return [prediction for _, prediction in sorted(found, key=lambda item: item[0])]
