"""Scores of relation extraction: those of SemEval-2010 Task 8, and micro-averages as in TACRED."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

DIRECTION = re.compile(r"\((e[12]),(e[12])\)$")
Scored = tuple[dict[str, float], list[dict[str, Any]]]
"""Corpus figures, and a row for each relation: name, precision, recall, f1, support."""


def relation_of(label: str) -> str:
    """The relation of a label such as `Cause-Effect(e2,e1)`, without its direction."""
    return DIRECTION.sub("", label)


def semeval_scores(predictions: Sequence[str], references: Sequence[str], no_relation: str | None) -> Scored:
    """The official score of SemEval-2010 Task 8, macro_f1: (9+1)-way, with direction taken into account.

    A prediction is right when relation and direction are. Precision of a relation is of all predictions of it, in
    either direction, recall of all its references in either direction, and the means are over the relations that the
    references have, without `no_relation` (Hendrickx et al. 2010, section 4.1, and scorer version 1.2).
    """
    proposed = Counter(map(relation_of, predictions))
    actual = Counter(map(relation_of, references))
    correct = Counter(relation_of(one) for one, wanted in zip(predictions, references, strict=True) if one == wanted)
    rows = [_row(name, correct[name], proposed[name], actual[name]) for name in sorted(actual) if name != no_relation]
    values = {f"macro_{name}": _mean([row[name] for row in rows]) for name in ("f1", "precision", "recall")}
    return values | {"accuracy": _accuracy(predictions, references)}, rows


def micro_scores(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str], no_relation: str | None
) -> Scored:
    """micro_f1 over all labels but `no_relation`, as in TACRED (Zhang et al. 2017, section 5)."""
    from sklearn.metrics import precision_recall_fscore_support

    relations = [label for label in labels if label != no_relation]
    given: Any = {"labels": relations, "zero_division": 0}
    micro = precision_recall_fscore_support(references, predictions, average="micro", **given)
    columns = precision_recall_fscore_support(references, predictions, average=None, **given)
    names = ("precision", "recall", "f1", "support")
    rows = [
        {"name": label} | {name: column[index].item() for name, column in zip(names, columns, strict=True)}
        for index, label in enumerate(relations)
    ]
    values = {f"micro_{name}": float(micro[names.index(name)]) for name in ("f1", "precision", "recall")}
    return values | {"accuracy": _accuracy(predictions, references)}, rows


def _row(name: str, correct: int, proposed: int, actual: int) -> dict[str, Any]:
    precision, recall = (correct / total if total else 0.0 for total in (proposed, actual))
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"name": name, "precision": precision, "recall": recall, "f1": f1, "support": actual}


def _accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    return _mean([float(one == wanted) for one, wanted in zip(predictions, references, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
