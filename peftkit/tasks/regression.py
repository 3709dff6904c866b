"""A number for a row, such as how alike two sentences are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.data.files import Rows
from peftkit.errors import DataError
from peftkit.tasks.base import Prediction, Scores, refuse_rows
from peftkit.tasks.losses import SquaredError
from peftkit.tasks.problems import Problem

if TYPE_CHECKING:
    from torch import Tensor


class Regression(Problem):
    """One output, trained on squared error in the data's own unit.

    Nothing is rescaled, neither in training nor in prediction, so a merged model gives the numbers by itself. Ranges
    such as 0 to 5 train well as they are; numbers in thousands are better divided before they come here.
    """

    headline = "pearson"
    figures = ("pearson", "spearman", "mse", "mae")
    losses = ("squared_error",)
    problem_type = "regression"

    @property
    def loss(self) -> SquaredError:
        assert isinstance(self.task.loss, SquaredError)
        return self.task.loss

    def names(self, train: Rows) -> tuple[str, ...]:
        self.references(train, ())
        return (self.task.label,)

    def references(self, rows: Rows, labels: Sequence[str]) -> list[float]:
        column = self.task.label
        rows.require(column)
        found = [_number(record[column]) for record in rows.records]
        bad = [index for index, number in enumerate(found) if number is None]
        if bad:
            value = rows.records[bad[0]][column]
            if len(bad) == len(rows) and (column in rows.features or (isinstance(value, str) and value.strip())):
                raise DataError(
                    f"{rows.source}: problem is regression, but '{column}' holds classes such as {value!r}; "
                    "use problem: single_label"
                )
            refuse_rows(rows, bad, f"'{column}' is {value!r}, no finite number", "a regression needs one in each row")
        return [number for number in found if number is not None]

    def targets(self, rows: Rows, labels: Sequence[str]) -> list[float]:
        return self.references(rows, labels)

    def answers(self, predictions: Sequence[Prediction], labels: Sequence[str]) -> list[float]:
        return [prediction["value"] for prediction in predictions]

    def weights(self, targets: Sequence[float], labels: Sequence[str]) -> list[float]:
        return [1.0]

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return self.loss.item_losses(logits.squeeze(-1), targets.to(logits)).sum()

    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        """To a thousandth: numbers that come from another order of additions are never quite equal."""
        return bool(((one - other).abs() <= 1e-3 * other.abs().clamp(min=1.0)).all())

    def predictions(self, logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
        return [{"value": number} for number in logits.squeeze(-1).cpu().tolist()]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.regression import RegressionReport

        answers = self.answers(predictions, labels)
        values = RegressionReport().compute(predictions=answers, references=self.references(rows, labels))
        return Scores(self.headline, dict(values), examples=len(answers))

    def majority(self, train: Rows, labels: Sequence[str]) -> Prediction:
        """The mean of train, which has the least squared error of all constants there."""
        numbers = self.references(train, labels)
        return {"value": math.fsum(numbers) / len(numbers)}


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
