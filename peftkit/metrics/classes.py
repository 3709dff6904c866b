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
    label with precision, recall, f1 and support. A class that is never predicted has precision 0. A prediction of −1,
    which is no class, is wrong.
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
        present = sorted({*references, *predictions} - {-1})
        # sklearn warns where a single class leaves the correlation undefined, and gives 0 too
        undefined = len({*references, *predictions}) < 2
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, labels=present, average="macro", zero_division=0.0)),
            "weighted_f1": float(
                f1_score(references, predictions, labels=present, average="weighted", zero_division=0.0)
            ),
            "matthews": 0.0 if undefined else float(matthews_corrcoef(references, predictions)),
            "per_class": _per_label(references, predictions, self._labels),
        }


class MultiLabelReport(evaluate.Metric):
    """`compute(predictions=…, references=…)` for rows of 0/1, one number a label.

    Returns micro_f1 (over all decisions together), macro_f1 and weighted_f1 (over labels, the latter by support) and
    subset_accuracy (rows with every label right), all in [0, 1], and `per_class`: one row a label.
    """

    def __init__(self, labels: Sequence[str], **options: Any) -> None:
        self._labels = list(labels)
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        marks = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Multi-label classification",
            citation="",
            inputs_description="rows of 0/1",
            features=datasets.Features({"predictions": marks, "references": marks}),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, Any]:
        averages = {
            f"{average}_f1": float(f1_score(references, predictions, average=average, zero_division=0.0))
            for average in ("micro", "macro", "weighted")
        }
        exact = float(accuracy_score(references, predictions))
        return averages | {
            "subset_accuracy": exact,
            "per_class": _per_label(references, predictions, self._labels),
        }


def _per_label(references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row a label: name, precision, recall, f1, support."""
    indices = list(range(len(labels)))
    columns = precision_recall_fscore_support(references, predictions, labels=indices, zero_division=0.0)
    names = ("precision", "recall", "f1", "support")
    return [
        {"name": label} | {name: column[i].item() for name, column in zip(names, columns, strict=True)}
        for i, label in enumerate(labels)
    ]
