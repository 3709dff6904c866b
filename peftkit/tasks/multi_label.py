"""Any number of labels for a row, none included: each is a yes or no of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.data.files import Rows
from peftkit.errors import DataError
from peftkit.tasks.base import Counts, Prediction, Scores, refuse_rows, refuse_unknown
from peftkit.tasks.label_names import by_position, in_order, label_text
from peftkit.tasks.losses import BinaryCrossEntropy
from peftkit.tasks.problems import Problem

if TYPE_CHECKING:
    from torch import Tensor

YES_OR_NO = {"0": False, "1": True, "false": False, "true": True}


class MultiLabel(Problem):
    """Labels in a list, in text with separators, or in one 0/1 column each; predicted where p ≥ threshold."""

    headline = "micro_f1"
    figures = ("micro_f1", "macro_f1", "weighted_f1", "subset_accuracy")
    losses = ("binary_cross_entropy",)
    problem_type = "multi_label_classification"

    @property
    def loss(self) -> BinaryCrossEntropy:
        assert isinstance(self.task.loss, BinaryCrossEntropy)
        return self.task.loss

    def names(self, train: Rows) -> tuple[str, ...]:
        if named := self.task.labels or self.task.label_columns:
            return named
        column = self.task.label
        found = self._listed(train)
        names = train.features.get(column) or in_order(text for texts in found for text in texts)
        if len(names) < 2:
            raise DataError(
                f"{train.source}: column '{column}' has {len(names)} label in all; multi-label classification needs "
                "two (a single yes or no is problem: single_label)"
            )
        return names

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The labels of each row, in label order."""
        found = self._ticked(rows) if self.task.label_columns else self._listed(rows)
        known = set(labels)
        unknown = {i: text for i, texts in enumerate(found) for text in texts if text not in known}
        refuse_unknown(rows, unknown, labels)
        return [[label for label in labels if label in texts] for texts in map(set, found)]

    def targets(self, rows: Rows, labels: Sequence[str]) -> list[list[int]]:
        """0 or 1 for each label."""
        return [_marks(texts, labels) for texts in self.references(rows, labels)]

    def answers(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[list[int]]:
        return [_marks(prediction["labels"], labels) for prediction in predictions]

    def weights(self, targets: Sequence[Sequence[int]], labels: Sequence[str]) -> list[float]:
        return self.loss.label_weights([sum(column) for column in zip(*targets, strict=True)], len(targets))

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return self.loss.item_losses(logits, targets, weights).sum()

    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        threshold = math.log(self.task.threshold / (1 - self.task.threshold))
        return bool(((one >= threshold) == (other >= threshold)).all())

    def predictions(self, logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
        return [self._prediction(row, labels) for row in logits.sigmoid().cpu().tolist()]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.classes import MultiLabelReport

        answers, targets = self.answers(predictions, labels), self.targets(rows, labels)
        values = MultiLabelReport(labels=labels).compute(predictions=answers, references=targets)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(answers))

    def counts(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Counts:
        """Micro F1: twice the right labels, of those that are given and those that are true."""
        pairs = zip(predictions, self.references(rows, labels), strict=True)
        both = [(set(one["labels"]), set(reference)) for one, reference in pairs]
        right = [2.0 * len(given & true) for given, true in both]
        return Counts(right, [float(len(given) + len(true)) for given, true in both])

    def majority(self, train: Rows, labels: Sequence[str]) -> Prediction:
        """The set of labels that, given to every row alike, has the best micro F1 on train."""
        found = self.references(train, labels)
        ranked = Counter(label for texts in found for label in texts).most_common()
        total = sum(count for _, count in ranked)
        right, best, size = 0, 0.0, 0
        for taken, (_, count) in enumerate(ranked, start=1):
            right += count
            if (f1 := 2 * right / (taken * len(found) + total)) > best:
                best, size = f1, taken
        chosen = {label for label, _ in ranked[:size]}
        return self._prediction([float(label in chosen) for label in labels], labels)

    def _prediction(self, probabilities: Sequence[float], labels: Sequence[str]) -> Prediction:
        by_label = dict(zip(labels, probabilities, strict=True))
        chosen = [label for label, probability in by_label.items() if probability >= self.task.threshold]
        return {"labels": chosen, "probabilities": by_label}

    def _listed(self, rows: Rows) -> list[list[str]]:
        column = self.task.label
        rows.require(column)
        found = [self._labels_of(record[column]) for record in rows.records]
        bad = [index for index, texts in enumerate(found) if texts is None]
        mend = "write a list, [] for none" if self.task.label_separator else "write a list, or set label_separator"
        refuse_rows(rows, bad, f"no list of labels in '{column}'", mend)
        return [by_position(texts or [], self.task.labels) for texts in found]

    def _labels_of(self, value: Any) -> list[str] | None:
        """The labels in one value; None where it is neither a list of labels nor text with separators."""
        if isinstance(value, str) and self.task.label_separator:
            parts = map(label_text, value.split(self.task.label_separator))
            return [text for text in parts if text is not None]
        if not isinstance(value, list | tuple):
            return None
        texts = [label_text(one) for one in value]
        return None if None in texts else [str(text) for text in texts]

    def _ticked(self, rows: Rows) -> list[list[str]]:
        columns = self.task.label_columns or ()
        rows.require(*columns)
        for column in columns:
            foreign = [i for i, record in enumerate(rows.records) if _yes(record[column]) is None]
            if foreign:
                value = rows.records[foreign[0]][column]
                refuse_rows(rows, foreign, f"'{column}' is {value!r}", "each of label_columns must be 0 or 1")
        return [[column for column in columns if _yes(record[column])] for record in rows.records]


def _yes(value: Any) -> bool | None:
    return YES_OR_NO.get((label_text(value) or "").lower())


def _marks(texts: Sequence[str], labels: Sequence[str]) -> list[int]:
    return [int(label in texts) for label in labels]
