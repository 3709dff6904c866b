"""Predictions of a saved run for new rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit.artifacts.store import SavedRun
from peftkit.data.files import Rows
from peftkit.evaluation import Evaluation, predict_examples
from peftkit.evaluation import evaluate as evaluate_split
from peftkit.prepare import Prepared, Split
from peftkit.session import make_accelerator
from peftkit.tasks.base import Prediction


def predict_rows(saved: SavedRun, rows: Rows) -> list[dict[str, Any]]:
    """What `peftkit predict` shows, one entry a row; labels are not needed."""
    task = saved.run.task
    predictions = predict_unlabelled(saved, rows)
    return [task.describe(one, record) for one, record in zip(predictions, rows.records, strict=True)]


def predict_unlabelled(saved: SavedRun, rows: Rows, model: Any = None) -> list[Prediction]:
    """Predictions by the run's model, or by another that takes the same inputs."""
    encoded = saved.run.task.encode(rows, saved.tokenizer, saved.head.labels, supervised=False)
    return predict_examples(
        model or saved.model,
        saved.run.task,
        encoded.examples,
        saved.head.labels,
        saved.pad_id,
        make_accelerator(saved.run),
        saved.run.training.evaluation_batch_size,
    )


def evaluate_rows(saved: SavedRun, rows: Rows, name: str = "test", metrics: Sequence[Any] = ()) -> Evaluation:
    """Scores of a saved run on any rows that have its columns."""
    encoded = saved.run.task.encode(rows, saved.tokenizer, saved.head.labels)
    split = Split(name, rows, encoded)
    data = Prepared(split, split, split, saved.head, saved.tokenizer, (), ())
    return evaluate_split(
        saved.model,
        saved.run.task,
        split,
        data,
        make_accelerator(saved.run),
        saved.run.training.evaluation_batch_size,
        metrics,
    )
