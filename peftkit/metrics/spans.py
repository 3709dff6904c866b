"""Entity precision, recall and F1 over whole spans, by seqeval (the CoNLL evaluation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support


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
        # not classification_report: it warns about splits without any entity
        columns = precision_recall_fscore_support(references, predictions, average=None, zero_division=0)
        micro = precision_recall_fscore_support(references, predictions, average="micro", zero_division=0)
        names = ("precision", "recall", "f1", "support")
        return {
            "entity_f1": float(micro[2]),
            "entity_precision": float(micro[0]),
            "entity_recall": float(micro[1]),
            "tag_accuracy": float(accuracy_score(references, predictions)),
            "per_class": [
                {"name": kind} | {name: column[i].item() for name, column in zip(names, columns, strict=True)}
                for i, kind in enumerate(_types(references, predictions))
            ],
        }


def _types(*splits: Sequence[Sequence[str]]) -> list[str]:
    """Entity types in seqeval's order."""
    return sorted({entity for split in splits for tags in split for entity, _, _ in get_entities(list(tags))})
