"""What every task provides: rows in, encoded examples, predictions and scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationInfo, model_validator

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings, Splits, read_splits
from peftkit.errors import DataError, UsageError
from peftkit.metrics.extra import AnyMetric
from peftkit.schema import Section, nearest
from peftkit.tasks.losses import AnyLoss, CrossEntropy, summed_loss

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
Batch = dict[str, Any]
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split. An example is what goes through the model at once: a row, or a window of one."""

    examples: list[Example]
    truncated: int
    """Rows cut at the maximum length."""
    owners: Sequence[int] | None = None
    """The index of the row that each example belongs to, ascending; None: every row is one example."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Rows (by index) that have no example, and why; only ever rows of train."""

    def __len__(self) -> int:
        return len(self.examples)

    def owner(self, index: int) -> int:
        """The index of the row that example `index` belongs to."""
        return index if self.owners is None else self.owners[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]


@dataclass(frozen=True)
class Scores:
    """How good a set of predictions is."""

    headline: str
    """The name in `values` that early stopping watches."""
    values: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """One row a class or entity type: name, precision, recall, f1, support."""
    examples: int = 0
    lower_is_better: bool = False
    """Of the headline: true of losses, errors and perplexity."""

    @property
    def value(self) -> float:
        """The headline figure."""
        return self.values[self.headline]

    @property
    def goodness(self) -> float:
        """The headline figure with the sign that makes more better."""
        return -self.value if self.lower_is_better else self.value


class Task(Section, ABC):
    """What is to be learnt, from which columns of which data."""

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

    @property
    @abstractmethod
    def headline(self) -> str:
        """The score that early stopping watches."""

    @abstractmethod
    def label_column(self) -> str | None:
        """The column of classes that a carved dev split is stratified by, where there is one."""

    def while_training(self) -> Task:
        """The task as dev is scored during training: without what takes long, such as generating text."""
        return self

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

    def class_weights(self, encoded: Encoded, labels: Sequence[str]) -> list[float]:
        """The weight of each class in the loss, from how often it occurs in training."""
        counts = Counter(label for example in encoded.examples for label in _supervised(example))
        return self.loss.class_weights([counts[index] for index in range(len(labels))])

    def example_weight(self, example: Example, class_weights: Sequence[float]) -> float:
        """What an example adds to the weight that the step's loss is divided by; 0 where nothing is supervised."""
        return sum(class_weights[label] for label in _supervised(example))

    def supervised_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (items, classes) and label ids (items,) of what is supervised in a batch."""
        labels = batch["labels"]
        kept = labels != IGNORED
        return self.logits(model, batch)[kept], labels[kept]

    def summed_loss(self, model: nn.Module, batch: Batch, class_weights: Tensor) -> Tensor:
        """Σ weight · loss over the supervised items of a batch; a scalar in float32."""
        return summed_loss(self.loss, *self.supervised_logits(model, batch), class_weights)

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        """One JSON-able prediction an example."""

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        """The prediction of each row, from those of its examples; what `predict` left as token ids becomes text."""
        return list(found)

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
    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction] | None:
        """The answer that ignores the input, such as the most frequent label of train; None where there is none."""


def _supervised(example: Example) -> list[int]:
    """The label ids of an example that count."""
    labels = example["labels"]
    return [labels] if isinstance(labels, int) else [label for label in labels if label != IGNORED]


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
