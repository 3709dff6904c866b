"""One label for a text, or for a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.errors import DataError, UsageError
from peftkit.tasks.base import Batch, Encoded, Prediction, Scores, Task, refuse_rows, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

NUMBER = re.compile(r"-?\d+")


class SequenceClassification(Task):
    """Sentiment, topic, intent, paraphrase: two or more classes, one per row."""

    kind: Literal["sequence_classification"] = "sequence_classification"
    text: str = "text"
    text_pair: str | None = None
    """Column of the second text, for sentence pairs."""
    label: str = "label"
    labels: tuple[str, ...] | None = None
    """Label order, fixed for good. Default: numbers ascending, texts alphabetically."""
    pooling: Literal["cls", "mean"] = "cls"
    """`cls`: the architecture's own head, on the first token of encoders and the last of decoders.
    `mean`: a linear layer on the mean over tokens, which equals the mean of a token classifier's logits."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(set(labels)) != len(labels) or len(labels) < 2):
            raise ValueError("labels must be two or more different names")
        return labels

    @property
    def headline(self) -> str:
        return "accuracy"

    def label_column(self) -> str:
        return self.label

    def head(self, train: Rows) -> Head:
        classes = {"cls": "AutoModelForSequenceClassification", "mean": "AutoModelForTokenClassification"}
        return Head(classes[self.pooling], self.labels or self._label_order(train))

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        texts = self._texts(rows, self.text)
        pairs = self._texts(rows, self.text_pair) if self.text_pair else None
        encoding = tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoding]
        examples = [{key: encoding[key][index] for key in keys} for index in range(len(texts))]
        if supervised:
            ids = {label: index for index, label in enumerate(labels)}
            for example, reference in zip(examples, self.references(rows, labels), strict=True):
                example["labels"] = ids[reference]
        return Encoded(examples, sum(bool(one.overflowing) for one in encoding.encodings or []))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, classes)."""
        logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        if self.pooling == "cls":
            return logits
        mask = batch["attention_mask"].unsqueeze(-1).to(logits.dtype)
        return (logits * mask).sum(1) / mask.sum(1)

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        probabilities = self.logits(model, batch).float().softmax(-1).cpu().tolist()
        return [_prediction(row, labels) for row in probabilities]

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.classes import ClassificationReport

        predicted, references = self.metric_inputs(predictions, rows, labels)
        values = ClassificationReport(labels=labels).compute(predictions=predicted, references=references)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(predicted))

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        ids = {label: index for index, label in enumerate(labels)}
        return [ids[p["label"]] for p in predictions], [ids[r] for r in self.references(rows, labels)]

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

    def references(self, rows: Rows, labels: Sequence[str]) -> list[str]:
        rows.require(self.label)
        found = [_label_text(record[self.label]) for record in rows.records]
        refuse_rows(rows, [i for i, one in enumerate(found) if one is None], "no label", f"fill in '{self.label}'")
        texts = self._by_position([str(label) for label in found])
        known = set(labels)
        refuse_unknown(rows, {i: text for i, text in enumerate(texts) if text not in known}, labels)
        return texts

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        winner = Counter(self.references(train, labels)).most_common(1)[0][0]
        return [_prediction([float(label == winner) for label in labels], labels)] * len(rows)

    def _label_order(self, train: Rows) -> tuple[str, ...]:
        train.require(self.label)
        found = {_label_text(record[self.label]) for record in train.records} - {None}
        texts = sorted(str(label) for label in found)
        if all(NUMBER.fullmatch(text) for text in texts):
            texts.sort(key=int)
        names = train.features.get(self.label) or tuple(texts)
        if len(names) < 2:
            raise DataError(f"{train.source}: column '{self.label}' has {len(names)} label; classification needs two")
        return names

    def _by_position(self, texts: list[str]) -> list[str]:
        """Numbers in the data are positions where the configuration has only names."""
        if not self.labels or any(NUMBER.fullmatch(label) for label in self.labels):
            return texts
        names = {str(position): label for position, label in enumerate(self.labels)}
        return [names.get(text, text) for text in texts]

    def _texts(self, rows: Rows, column: str) -> list[str]:
        rows.require(column)
        values = [record[column] for record in rows.records]
        empty = [i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
        refuse_rows(rows, empty, f"no text in '{column}'", "remove the row or fill it in")
        return values


def _label_text(value: Any) -> str | None:
    """A label as text; 3.0 from a table of floats is the label 3."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _prediction(probabilities: Sequence[float], labels: Sequence[str]) -> Prediction:
    best = max(range(len(labels)), key=probabilities.__getitem__)
    return {
        "label": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }
