"""Accuracy, F1, Matthews correlation and the per-class table, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_recall_fscore_support


class ClassificationReport(evaluate.Metric):
    """`compute(predictions=…, references=…)` for class indices.

    Returns accuracy, macro_f1, weighted_f1 and matthews in [0, 1] ([−1, 1] for the last), and `per_class`: one row a
    label with precision, recall, f1 and support. A class that is never predicted has precision 0.
    """

    def __init__(self, labels: Sequence[str], **options: Any) -> None:
        self._labels = list(labels)
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Single-label classification",
            citation="",
            inputs_description="class indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        indices = list(range(len(self._labels)))
        columns = precision_recall_fscore_support(references, predictions, labels=indices, zero_division=0.0)
        names = ("precision", "recall", "f1", "support")
        per_class: list[dict[str, Any]] = [
            {"name": label} | {name: column[i].item() for name, column in zip(names, columns, strict=True)}
            for i, label in enumerate(self._labels)
        ]
        # sklearn warns where a single class leaves the correlation undefined, and gives 0 too
        undefined = len({*references, *predictions}) < 2
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
            "weighted_f1": float(f1_score(references, predictions, average="weighted", zero_division=0.0)),
            "matthews": 0.0 if undefined else float(matthews_corrcoef(references, predictions)),
            "per_class": per_class,
        }
