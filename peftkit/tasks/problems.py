"""What the outputs of a sequence classifier stand for; here: classes, of which each row has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.data.files import Rows
from peftkit.errors import DataError
from peftkit.tasks.base import Counts, Prediction, Scores, refuse_rows, refuse_unknown
from peftkit.tasks.label_names import by_position, in_order, label_text
from peftkit.tasks.losses import CrossEntropy, summed_loss

if TYPE_CHECKING:
    from torch import Tensor

    from peftkit.tasks.sequence_classification import SequenceClassification

MANY = 20
"""Different numbers that may still be classes without a second look."""


class Problem(ABC):
    """One meaning of the outputs: how the data says it, how it is learnt, predicted and scored."""

    headline: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]
    """What `score` gives."""
    losses: ClassVar[tuple[str, ...]]
    """The kinds of loss that fit."""
    problem_type: ClassVar[str | None] = None
    """transformers' name, by which its pipelines know what to make of logits."""

    def __init__(self, task: SequenceClassification) -> None:
        self.task = task

    @abstractmethod
    def names(self, train: Rows) -> tuple[str, ...]:
        """What the outputs are called, in their order."""

    @abstractmethod
    def references(self, rows: Rows, labels: Sequence[str]) -> list[Any]:
        """The right answer of each row, as the data says it."""

    @abstractmethod
    def targets(self, rows: Rows, labels: Sequence[str]) -> list[Any]:
        """The right answer of each row as numbers: what an example holds as `labels`, and metrics take."""

    @abstractmethod
    def answers(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[Any]:
        """Predictions in the form of `targets`."""

    @abstractmethod
    def weights(self, targets: Sequence[Any], labels: Sequence[str]) -> list[float]:
        """What the loss weighs outputs with, from the targets of train."""

    def example_weight(self, target: Any, weights: Sequence[float]) -> float:
        """What an example adds to the weight that the step's loss is divided by."""
        return 1.0

    @abstractmethod
    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · loss, for float32 logits of shape (examples, outputs)."""

    @abstractmethod
    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        """Whether two logits (outputs,) stand for the same answer."""

    @abstractmethod
    def predictions(self, logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
        """One prediction for each row of logits (examples, outputs)."""

    @abstractmethod
    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        """Corpus figures."""

    def counts(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Counts | None:
        """What each row adds to the headline figure; None where that is no ratio of sums over rows."""
        return None

    @abstractmethod
    def majority(self, train: Rows, labels: Sequence[str]) -> Prediction:
        """The answer that ignores the input."""


class SingleLabel(Problem):
    """Two or more classes, one for each row."""

    headline = "accuracy"
    figures = ("accuracy", "macro_f1", "weighted_f1", "matthews")
    losses = ("cross_entropy", "weighted", "label_smoothed", "focal")

    @property
    def loss(self) -> CrossEntropy:
        assert isinstance(self.task.loss, CrossEntropy)
        return self.task.loss

    def names(self, train: Rows) -> tuple[str, ...]:
        if self.task.labels:
            return self.task.labels
        column = self.task.label
        train.require(column)
        texts = [text for record in train.records if (text := label_text(record[column])) is not None]
        names = train.features.get(column) or in_order(texts)
        if len(names) < 2:
            raise DataError(f"{train.source}: column '{column}' has {len(names)} label; classification needs two")
        if column not in train.features:
            self._refuse_measurements(train, names)
        return names

    def _refuse_measurements(self, train: Rows, names: Sequence[str]) -> None:
        """Prices, ages or scores would become a class each."""
        if len(names) <= MANY or not all(map(_is_number, names)):
            return
        fraction = next((name for name in names if not float(name).is_integer()), None)
        if fraction is not None or 2 * len(names) > len(train):
            example = fraction or names[-1]
            raise DataError(
                f"{train.source}: column '{self.task.label}' holds {len(names):,} different numbers such as {example}, "
                "which look like no classes; set problem: regression, or name them all in labels"
            )

    def references(self, rows: Rows, labels: Sequence[str]) -> list[str]:
        rows.require(self.task.label)
        found = [label_text(record[self.task.label]) for record in rows.records]
        empty = [index for index, text in enumerate(found) if text is None]
        refuse_rows(rows, empty, "no label", f"fill in '{self.task.label}'")
        texts = by_position([str(text) for text in found], self.task.labels)
        known = set(labels)
        refuse_unknown(rows, {index: text for index, text in enumerate(texts) if text not in known}, labels)
        return texts

    def targets(self, rows: Rows, labels: Sequence[str]) -> list[int]:
        ids = {label: index for index, label in enumerate(labels)}
        return [ids[reference] for reference in self.references(rows, labels)]

    def answers(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[int]:
        ids = {label: index for index, label in enumerate(labels)}
        return [ids[prediction["label"]] for prediction in predictions]

    def weights(self, targets: Sequence[int], labels: Sequence[str]) -> list[float]:
        counts = Counter(targets)
        return self.loss.class_weights([counts[index] for index in range(len(labels))])

    def example_weight(self, target: int, weights: Sequence[float]) -> float:
        return weights[target]

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return summed_loss(self.loss, logits, targets, weights)

    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        return bool(one.argmax(-1) == other.argmax(-1))

    def predictions(self, logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
        return [_prediction(row, labels) for row in logits.softmax(-1).cpu().tolist()]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.classes import ClassificationReport

        answers, targets = self.answers(predictions, labels), self.targets(rows, labels)
        values = ClassificationReport(labels=labels).compute(predictions=answers, references=targets)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(answers))

    def counts(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Counts:
        """Right answers, of one a row."""
        pairs = zip(predictions, self.references(rows, labels), strict=True)
        return Counts([float(one["label"] == reference) for one, reference in pairs], [1.0] * len(rows))

    def majority(self, train: Rows, labels: Sequence[str]) -> Prediction:
        winner = Counter(self.references(train, labels)).most_common(1)[0][0]
        return _prediction([float(label == winner) for label in labels], labels)


def _prediction(probabilities: Sequence[float], labels: Sequence[str]) -> Prediction:
    best = max(range(len(labels)), key=probabilities.__getitem__)
    return {
        "label": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
