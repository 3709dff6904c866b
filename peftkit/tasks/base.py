"""What every task provides: rows in, encoded examples, predictions and scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationInfo, model_validator

from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings, Splits, read_splits
from peftkit.errors import DataError, UsageError
from peftkit.metrics.extra import AnyMetric
from peftkit.schema import Section, nearest
from peftkit.tasks.losses import AnyLoss, CrossEntropy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
Batch = dict[str, Any]
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split; `examples[i]` belongs to `rows.records[i]`."""

    examples: list[Example]
    truncated: int
    """Rows cut at the maximum length."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]


@dataclass(frozen=True)
class Scores:
    """How good a set of predictions is."""

    headline: str
    """The name in `values` that early stopping watches; higher is better."""
    values: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """One row a class or entity type: name, precision, recall, f1, support."""
    examples: int = 0

    @property
    def value(self) -> float:
        """The headline figure."""
        return self.values[self.headline]


class Task(Section, ABC):
    """What is to be learnt, from which columns of which data."""

    headline: ClassVar[str]
    """The score that early stopping watches; higher is better."""
    kind: str
    data: DataSettings | None = None
    """Left out only where the rows are handed over in Python: `peftkit.train(run, splits=…)`."""
    max_length: Annotated[int, Field(gt=2)] = 256
    """Tokens; longer texts are cut, and counted."""
    loss: AnyLoss = CrossEntropy()
    metrics: tuple[AnyMetric, ...] = ()

    @model_validator(mode="after")
    def _names_its_data(self, info: ValidationInfo) -> Self:
        # a configuration file must name them; that of a run from Python says null
        if info.mode == "json" and "data" not in self.model_fields_set:
            raise ValueError("data is missing: name a file as data.train, or a data set as data.name")
        return self

    @abstractmethod
    def label_column(self) -> str:
        """The column that holds what is to be predicted."""

    def splits(self) -> Splits:
        """Raw rows of train, dev and test, as the configuration names them.

        Raises:
            UsageError: it names none, because they were handed over in Python.
        """
        if self.data is None:
            raise UsageError("task.data names no rows, so they must be given: in Python as splits, or as --data FILE")
        return read_splits(self.data, label=self.label_column())

    @abstractmethod
    def head(self, train: Rows) -> Head:
        """The model class, and the labels in the order that is kept for good."""

    @abstractmethod
    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        """Token ids, and label ids when `supervised`.

        Raises:
            DataError: a row without text or label, or a label that training does not have; with file and line.
        """

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits with the classes last; leading dimensions as in `batch["labels"]`."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        """One JSON-able prediction an example."""

    @abstractmethod
    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        """Corpus figures of predictions for `rows`."""

    @abstractmethod
    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        """Raw texts, as a person types them, as rows without labels."""

    @abstractmethod
    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        """A prediction as `peftkit predict` shows it."""

    @abstractmethod
    def references(self, rows: Rows, labels: Sequence[str]) -> list[Any]:
        """What each prediction is compared with, in labels' text."""

    @abstractmethod
    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """(predictions, references) as `evaluate` modules take them."""

    @abstractmethod
    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        """The answer that ignores the input: always the most frequent label of train."""


def refuse_rows(rows: Rows, indices: Sequence[int], what: str, mend: str) -> None:
    """Raise one DataError for all of `indices`, naming the first places."""
    if indices:
        places = ", ".join(rows.where(index) for index in indices[:3])
        more = f" and {len(indices) - 3:,} more" if len(indices) > 3 else ""
        raise DataError(f"{places}{more}: {what}; {mend}")


def refuse_unknown(rows: Rows, unknown: Mapping[int, str], labels: Sequence[str]) -> None:
    """Raise one DataError for rows (by index) with a label that training does not have."""
    for label in dict.fromkeys(unknown.values()):
        indices = [index for index, one in unknown.items() if one == label]
        near = nearest(label, labels)
        more = ", …" if len(labels) > 12 else ""
        hint = f"did you mean '{near}'?" if near else f"training has: {', '.join(labels[:12])}{more}"
        refuse_rows(rows, indices, f"label '{label}' never occurs in training", hint)
