"""What every task provides: rows in, encoded examples, predictions and scores out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationInfo, model_validator

from peftkit.backbones.load import Head
from peftkit.data.augment import AnyAugmentation
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.mix import AnyData, read_data
from peftkit.data.sources import Splits
from peftkit.errors import DataError, UsageError
from peftkit.metrics.extra import AnyMetric
from peftkit.schema import Section, nearest
from peftkit.tasks.losses import AnyLoss, CrossEntropy, summed_loss
from peftkit.tasks.outputs import Outputs, divergences
from peftkit.tasks.scores import Counts, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
Batch = dict[str, Any]
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split. An example is what goes through the model at once: a row, or a window of one."""

    examples: Sequence[Example]
    truncated: int
    """Rows cut at the maximum length."""
    owners: Sequence[int] | None = None
    """The index of the row that each example belongs to, ascending; None: every row is one example."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Rows (by index) that have no example, and why; only ever rows of train."""
    notes: tuple[str, ...] = ()
    """What else was done to the rows, in plain words."""

    def __len__(self) -> int:
        return len(self.examples)

    def owner(self, index: int) -> int:
        """The index of the row that example `index` belongs to."""
        return index if self.owners is None else self.owners[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        if not isinstance(self.examples, list):
            from peftkit.data.arrays import Table

            if isinstance(self.examples, Table):
                return self.examples.columns["input_ids"].lengths()
        return [len(example["input_ids"]) for example in self.examples]


class Task(Section, ABC):
    """What is to be learnt, from which columns of which data."""

    kind: str
    data: AnyData | None = None
    """Left out only where the rows are handed over in Python: `peftkit.train(run, splits=…)`."""
    max_length: Annotated[int, Field(gt=2)] = 256
    """Tokens; longer texts are cut, and counted."""
    loss: AnyLoss = CrossEntropy()
    metrics: tuple[AnyMetric, ...] = ()
    averages: ClassVar[bool] = False
    """Predictions come from `logits` alone, item by item, so that those of several models have a mean."""
    augmentation: tuple[AnyAugmentation, ...] = ()
    """What adds changed copies to the rows of train: deletion, swap, typos, synonyms, back_translation."""

    @model_validator(mode="after")
    def _names_its_data(self, info: ValidationInfo) -> Self:
        # a configuration file must name them; that of a run from Python says null
        if info.mode == "json" and "data" not in self.model_fields_set:
            raise ValueError("data is missing: name a file as data.train, or a data set as data.name")
        return self

    @model_validator(mode="after")
    def _augments_what_it_can(self) -> Self:
        if self.augmentation and not self.free_texts:
            raise ValueError(
                f"augmentation: the answers of task '{self.kind}' belong to single words, or are text themselves, and "
                "would not fit changed words; leave it out"
            )
        return self

    @property
    def free_texts(self) -> tuple[str, ...]:
        """Columns whose words may change without changing the answer; none where answers depend on single words."""
        return ()

    @property
    @abstractmethod
    def headline(self) -> str:
        """The score that early stopping watches."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures of `score` by which runs may be compared, the headline first."""
        return (self.headline,)

    @abstractmethod
    def label_column(self) -> str | None:
        """The column of classes that a carved dev split is stratified by, where there is one."""

    def text_columns(self, rows: Rows) -> tuple[str, ...]:
        """The columns of what is read and written, for the audit of the data: those that a setting names, alone or in a
        template; without any, all but the labels."""
        known, label = rows.head(1000).column_names, self.label_column()
        settings = [value for name, value in self if isinstance(value, str) and not name.startswith("label")]
        named = {one for value in settings for one in (value, *re.findall(r"\{(\w[^{}]*)\}", value))}
        return tuple(name for name in known if name in named and name != label) or tuple(
            name for name in known if name != label
        )

    @property
    def longest_input(self) -> int:
        """The most tokens that the model is ever given at once."""
        return self.max_length

    def for_epoch(self, example: Example, epoch: int) -> Example:
        """An example of train in one epoch (from 0), for what is drawn anew each time; pure, and of the same weight."""
        return example

    def order(self, encoded: Encoded) -> list[int]:
        """Examples in the order in which an evaluation cuts them into batches: those of similar length together, the
        longest first, because memory that the first batch took serves the others."""
        return sorted(range(len(encoded)), key=lambda index: -encoded.lengths[index])

    def scoring_note(self, encoded: Encoded) -> str:
        """What of a split the scores leave out, in plain words; empty where they are of everything."""
        return ""

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
        return read_data(self.data, label=self.label_column())

    @abstractmethod
    def head(self, train: Rows) -> Head:
        """The model class, and the labels in the order that is kept for good."""

    def check_backbone(self, config: Any, virtual_tokens: int) -> None:
        """Refuse an architecture that cannot do this task, before its weights load.

        Args:
            config: the model's configuration.
            virtual_tokens: positions that the method takes.

        Raises:
            BackboneError, UsageError: what it lacks, or how long a text it takes.
        """
        return

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

    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        """Whether two computations of an example's logits stand for the same answer."""
        return bool((one.argmax(-1) == other.argmax(-1)).all())

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
        return self.loss_of(*self.supervised_logits(model, batch), class_weights)

    def loss_of(self, logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
        """Σ weight · loss of what `supervised_logits` returned; a scalar in float32."""
        return summed_loss(self.loss, logits, labels, class_weights)

    @property
    def outputs(self) -> Outputs:
        """What each item's logits stand for."""
        return "classes"

    def divergence(self, one: Tensor, other: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
        """Σ weight · ½ (KL(p ‖ q) + KL(q ‖ p)) between two sets of supervised logits; a scalar in float32."""
        found = divergences(self.outputs, one.float(), other.float())
        weighted = self.outputs == "classes" and len(class_weights)
        return (found * class_weights[labels]).sum() if weighted else found.sum()

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

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        """What each row adds to a figure; None where that is no ratio of sums over rows.

        Args:
            figure: one of `figures`; the headline unless named.
        """
        return None

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
