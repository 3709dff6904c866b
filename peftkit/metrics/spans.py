"""Entity precision, recall and F1 over whole spans, by seqeval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import evaluate
from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.metrics.v1 import unique_labels
from seqeval.scheme import BILOU, IOBES

STRICT = {"iobes": IOBES, "bilou": BILOU}


class EntityReport(evaluate.Metric):
    """`compute(predictions=…, references=…)` for lists of tags.

    Returns entity_precision, entity_recall, entity_f1 (micro average over entities: type and both ends right) and
    tag_accuracy, and `per_class`: one row an entity type. Of BIO, an I- that continues nothing starts an entity, as in
    the CoNLL evaluation; of IOBES and BILOU only entities that are spelt right from first to last count.
    """

    def __init__(self, scheme: Literal["bio", "iob1", "io", "iobes", "bilou"] = "bio", **options: Any) -> None:
        self._scheme = STRICT.get(scheme)
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Entities as in CoNLL-2003",
            citation="",
            inputs_description="lists of tags",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        columns = self._scores(references, predictions, None)
        micro = self._scores(references, predictions, "micro")
        names = ("precision", "recall", "f1", "support")
        return {
            "entity_f1": float(micro[2]),
            "entity_precision": float(micro[0]),
            "entity_recall": float(micro[1]),
            "tag_accuracy": float(accuracy_score(references, predictions)),
            "per_class": [
                {"name": kind} | {name: column[i].item() for name, column in zip(names, columns, strict=True)}
                for i, kind in enumerate(self._types(references, predictions))
            ],
        }

    def _scores(self, references: Any, predictions: Any, average: str | None) -> Any:
        # not classification_report: it warns about splits without any entity
        options = {"average": average, "zero_division": 0}
        if self._scheme:
            return strict_scores(references, predictions, scheme=self._scheme, **options)
        return precision_recall_fscore_support(references, predictions, **options)

    def _types(self, *splits: Sequence[Sequence[str]]) -> list[str]:
        """Entity types in seqeval's order."""
        if self._scheme:
            return list(unique_labels(*splits, scheme=self._scheme))
        return sorted({entity for split in splits for tags in split for entity, _, _ in get_entities(list(tags))})
