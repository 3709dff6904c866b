"""Scores a model on a split of a task. Never knows how the model was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.data.collate import collate
from peftkit.engine.engage import shortened
from peftkit.engine.settings import Engine
from peftkit.errors import TrainingError
from peftkit.metrics.extra import extra_values
from peftkit.prepare import Split
from peftkit.tasks.base import Prediction, Scores, Task
from peftkit.training.on_request import on_request
from peftkit.training.sharding import place
from peftkit.training.watch import pace_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the predictions they were computed from, in the order of the split."""

    split: Split
    scores: Scores
    predictions: list[Prediction]


def evaluate(
    model: nn.Module, task: Task, split: Split, accelerator: Accelerator, metrics: Sequence[Any] = ()
) -> Evaluation:
    """Predict a whole split, over all processes, and score it.

    Args:
        model: in any mode; its mode is kept.
        metrics: `evaluate` modules beside those that `task.metrics` names.
    """
    predictions = predict(model, task, split, accelerator)
    pace_of(accelerator).beat("scoring", split.name)
    scores = task.score(predictions, split.rows, split.labels)
    extra = (*task.metrics, *metrics)
    if extra:
        inputs = task.metric_inputs(predictions, split.rows, split.labels)
        scores = dataclasses.replace(scores, values=scores.values | extra_values(extra, *inputs, known=scores.values))
    pace_of(accelerator).rest("after scoring")
    return Evaluation(split, scores, predictions)


def baselines(task: Task, train: Split, split: Split) -> dict[str, Evaluation]:
    """`majority`: the score of an answer that ignores the input, where the task has such an answer."""
    predictions = task.majority(train.rows, split.rows, split.labels)
    if predictions is None:
        return {}
    return {"majority": Evaluation(split, task.score(predictions, split.rows, split.labels), predictions)}


def predict(model: nn.Module, task: Task, split: Split, accelerator: Accelerator) -> list[Prediction]:
    """The prediction of each row, in the order of the split, the same for any number of processes.

    Batches hold examples of similar length; every process takes every n-th batch.

    Raises:
        TrainingError: the model computes NaN.
    """
    import torch
    from accelerate.utils import gather_object

    examples, order = split.encoded.examples, task.order(split.encoded)
    batches = [order[start : start + split.batch_size] for start in range(0, len(order), split.batch_size)]
    was_training = model.training
    place(model, accelerator)
    model.eval()
    found: list[tuple[int, Prediction]] = []
    pace = pace_of(accelerator)
    engine = getattr(accelerator, "engine", Engine())
    with shortened(model, engine), on_request(model, accelerator), torch.no_grad(), accelerator.autocast():
        for indices in batches[accelerator.process_index :: accelerator.num_processes]:
            pace.beat("predicting", split.name)
            batch = collate([examples[index] for index in indices], split.pad_id, accelerator.device)
            pace.beat("predicting", split.name)
            found.extend(zip(indices, task.predict(model, batch, split.labels), strict=True))
    model.train(was_training)
    pace.arrive()
    if accelerator.num_processes > 1:
        found = gather_object(found)
    predictions = [prediction for _, prediction in sorted(found, key=lambda item: item[0])]
    _refuse_nan(predictions, split)
    return task.join(predictions, split.encoded, split.rows, split.tokenizer)


def _refuse_nan(predictions: Sequence[Prediction], split: Split) -> None:
    """A model that computes no numbers still has an argmax, and would get a score."""
    for index, prediction in enumerate(predictions):
        try:
            json.dumps(prediction, allow_nan=False)
        except ValueError:
            raise TrainingError(
                f"the model's probabilities are not numbers at {split.where(index)}; its weights hold NaN or "
                "infinity: check the backbone, or train again with a lower training.learning_rate"
            ) from None
