"""Predictions and scores of a saved run on new rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit.artifacts.store import SavedRun
from peftkit.data.files import Rows
from peftkit.evaluation import Evaluation, evaluate, predict
from peftkit.prepare import encode_split
from peftkit.session import inference_accelerator


def predict_rows(saved: SavedRun, rows: Rows) -> list[dict[str, Any]]:
    """What `peftkit predict` shows, one entry a row; labels are not needed."""
    task = saved.run.task
    split = encode_split(saved.run, rows.source, rows, saved.head, saved.tokenizer, supervised=False)
    predictions = predict(saved.model, task, split, inference_accelerator(saved.run))
    return [task.describe(one, record) for one, record in zip(predictions, rows.records, strict=True)]


def evaluate_rows(saved: SavedRun, rows: Rows, metrics: Sequence[Any] = ()) -> Evaluation:
    """Scores of a saved run on any rows that have its columns."""
    split = encode_split(saved.run, rows.source, rows, saved.head, saved.tokenizer)
    return evaluate(saved.model, saved.run.task, split, inference_accelerator(saved.run), metrics)
