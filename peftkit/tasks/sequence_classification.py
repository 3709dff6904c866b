"""Labels or a number for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.engine.last_block import reading_texts
from peftkit.errors import UsageError
from peftkit.tasks.base import Batch, Counts, Encoded, Example, Prediction, Scores, Task
from peftkit.tasks.columns import texts_in
from peftkit.tasks.label_names import distinct
from peftkit.tasks.losses import AnySequenceLoss, BinaryCrossEntropy, CrossEntropy, SquaredError
from peftkit.tasks.multi_label import MultiLabel
from peftkit.tasks.outputs import Outputs
from peftkit.tasks.problems import Problem, SingleLabel
from peftkit.tasks.regression import Regression

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

PROBLEMS: dict[str, type[Problem]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "regression": Regression,
}
OUTPUTS: dict[str, Outputs] = {"single_label": "classes", "multi_label": "marks", "regression": "number"}
LOSSES = {"single_label": CrossEntropy(), "multi_label": BinaryCrossEntropy(), "regression": SquaredError()}


class SequenceClassification(Task):
    """Sentiment, topic, intent, paraphrase; several labels at once; or a number such as a similarity."""

    averages: ClassVar[bool] = True
    kind: Literal["sequence_classification"] = "sequence_classification"
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    """`single_label`: two or more classes, one a row. `multi_label`: any number of labels a row, none included.
    `regression`: a number a row, trained on squared error in the data's own unit."""
    text: str = "text"
    text_pair: str | None = None
    """Column of the second text, for sentence pairs."""
    label: str = "label"
    """Column of the class, of the list of labels, or of the number."""
    labels: tuple[str, ...] | None = None
    """Label order, fixed for good. Default: numbers ascending, texts alphabetically."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """multi_label: what stands between the labels where `label` holds text, as in a .csv."""
    label_columns: tuple[str, ...] | None = None
    """multi_label: columns of 0 and 1, one a label, in place of `label`."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """multi_label: the probability from which a label is given."""
    pooling: Literal["cls", "mean"] = "cls"
    """`cls`: the architecture's own head, on the first token of encoders and the last of decoders.
    `mean`: a linear layer on the mean over tokens, which equals the mean of a token classifier's logits."""
    loss: AnySequenceLoss = CrossEntropy()  # type: ignore[assignment]
    """Default: cross_entropy of classes, binary_cross_entropy of labels, squared_error of numbers."""

    @field_validator("labels", "label_columns")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        return distinct(labels, info.field_name)

    @model_validator(mode="after")
    def _default_loss(self) -> SequenceClassification:
        if "loss" not in self.model_fields_set:
            # not before validation, which would turn JSON's lists into Python's, and those are no tuples
            object.__setattr__(self, "loss", LOSSES[self.problem])
        return self

    @model_validator(mode="after")
    def _belong_together(self) -> SequenceClassification:
        fitting = PROBLEMS[self.problem].losses
        if self.loss.kind not in fitting:
            raise ValueError(
                f"loss '{self.loss.kind}' does not fit problem '{self.problem}'; it can be: {', '.join(fitting)}"
            )
        if self.problem != "multi_label":
            given = [name for name in ("label_separator", "label_columns") if getattr(self, name) is not None]
            given += ["threshold"] if self.threshold != 0.5 else []
            if given:
                raise ValueError(f"{' and '.join(given)}: only of problem 'multi_label', not '{self.problem}'")
        if self.label_columns and (self.labels or self.label_separator):
            other = "labels" if self.labels else "label_separator"
            raise ValueError(f"label_columns name the labels by themselves; leave {other} out")
        if self.problem == "regression" and self.labels:
            raise ValueError("labels are of classes, and a regression has none; leave them out")
        return self

    @property
    def meaning(self) -> Problem:
        """What the outputs stand for."""
        return PROBLEMS[self.problem](self)

    @property
    def free_texts(self) -> tuple[str, ...]:
        return (self.text, *([self.text_pair] if self.text_pair else []))

    @property
    def headline(self) -> str:
        return self.meaning.headline

    @property
    def figures(self) -> tuple[str, ...]:
        return self.meaning.figures

    def label_column(self) -> str | None:
        return self.label if self.problem == "single_label" else None

    def head(self, train: Rows) -> Head:
        classes = {"cls": "AutoModelForSequenceClassification", "mean": "AutoModelForTokenClassification"}
        meaning = self.meaning
        return Head(classes[self.pooling], meaning.names(train), problem_type=meaning.problem_type)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        texts = texts_in(rows, self.text)
        pairs = texts_in(rows, self.text_pair) if self.text_pair else None
        encoding = tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoding]
        examples = [{key: encoding[key][index] for key in keys} for index in range(len(texts))]
        if supervised:
            for example, target in zip(examples, self.meaning.targets(rows, labels), strict=True):
                example["labels"] = target
        return Encoded(examples, sum(bool(one.overflowing) for one in encoding.encodings or []))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, outputs)."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.pooling == "cls":
            with reading_texts(model, batch["attention_mask"]):
                found: Tensor = model(**inputs).logits
            return found
        logits: Tensor = model(**inputs).logits
        mask = batch["attention_mask"].unsqueeze(-1).to(logits.dtype)
        return (logits * mask).sum(1) / mask.sum(1)

    def answers_alike(self, one: Tensor, other: Tensor) -> bool:
        return self.meaning.answers_alike(one, other)

    def class_weights(self, encoded: Encoded, labels: Sequence[str]) -> list[float]:
        return self.meaning.weights([example["labels"] for example in encoded.examples], labels)

    def example_weight(self, example: Example, class_weights: Sequence[float]) -> float:
        return self.meaning.example_weight(example["labels"], class_weights)

    def supervised_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (examples, outputs), and class ids (examples,), marks (examples, labels) or numbers (examples,)."""
        return self.logits(model, batch), batch["labels"]

    def loss_of(self, logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
        return self.meaning.summed_loss(logits.float(), labels, class_weights)

    @property
    def outputs(self) -> Outputs:
        return OUTPUTS[self.problem]

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        return self.meaning.predictions(self.logits(model, batch).float(), labels)

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        return self.meaning.score(predictions, rows, labels)

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        return self.meaning.counts(predictions, rows, labels) if figure in (None, self.headline) else None

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """Class ids, rows of 0/1, or numbers."""
        return self.meaning.answers(predictions, labels), self.meaning.targets(rows, labels)

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        if (pairs is None) != (self.text_pair is None):
            wanted = "pairs of texts" if self.text_pair else "single texts"
            raise UsageError(f"this model was trained on {wanted}; give it those")
        if pairs is not None and len(pairs) != len(texts):
            raise UsageError(f"{len(texts)} texts and {len(pairs)} second texts; give each text its pair")
        if pairs is None:
            records = [{self.text: text} for text in texts]
        else:
            records = [{self.text: one, str(self.text_pair): two} for one, two in zip(texts, pairs, strict=True)]
        return Rows("input", records, range(1, len(records) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        texts = {"text": record[self.text]} | ({"text_pair": record[self.text_pair]} if self.text_pair else {})
        return texts | prediction

    def references(self, rows: Rows, labels: Sequence[str]) -> list[Any]:
        return self.meaning.references(rows, labels)

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        return [self.meaning.majority(train, labels)] * len(rows)
