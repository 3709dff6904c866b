"""Entity precision, recall and F1 over whole spans, by seqeval (the CoNLL evaluation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from seqeval.metrics import accuracy_score, classification_report


class EntityReport(evaluate.Metric):
    """`compute(predictions=…, references=…)` for lists of BIO tags.

    Returns entity_precision, entity_recall, entity_f1 (micro average over entities: type and both ends right) and
    tag_accuracy, and `per_class`: one row an entity type.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Entities as in CoNLL-2003",
            citation="",
            inputs_description="lists of BIO tags",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        report = classification_report(references, predictions, output_dict=True, zero_division=0)
        micro = report["micro avg"]
        per_class = [_row(name, row) for name, row in report.items() if not name.endswith(" avg")]
        return {
            "entity_f1": float(micro["f1-score"]),
            "entity_precision": float(micro["precision"]),
            "entity_recall": float(micro["recall"]),
            "tag_accuracy": float(accuracy_score(references, predictions)),
            "per_class": per_class,
        }


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "precision": float(row["precision"]),
        "recall": float(row["recall"]),
        "f1": float(row["f1-score"]),
        "support": int(row["support"]),
    }
