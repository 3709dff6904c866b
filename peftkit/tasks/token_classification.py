"""A tag for every word: named entities and slots, in BIO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.errors import DataError, UsageError
from peftkit.tasks.base import Batch, Encoded, Prediction, Scores, Task, refuse_rows, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

OUTSIDE = "O"
TYPED = "(typed)"  # where rows_from_text keeps the text and the offsets of its words
WORD = re.compile(r"\w+(?:['’\-.]\w+)*|[@#]\w+|[^\w\s]")


class TokenClassification(Task):
    """Named entities: rows of words with a BIO tag each.

    The first sub-word of a word carries its tag; the others are not supervised. Words beyond `max_length`
    are predicted as `O`, so cutting costs recall and never shortens the test.
    """

    kind: Literal["token_classification"] = "token_classification"
    tokens: str = "tokens"
    tags: str = "tags"

    @property
    def headline(self) -> str:
        return "entity_f1"

    def label_column(self) -> str:
        return self.tags

    def head(self, train: Rows) -> Head:
        self._check_lists(train, self.tags, "tags")
        tags = {str(tag) for record in train.records for tag in record[self.tags]}
        if train.features.get(self.tags):
            tags = set(train.features[self.tags])
        foreign = sorted(tag for tag in tags if tag != OUTSIDE and not re.fullmatch(r"[BI]-.+", tag))
        if foreign:
            raise DataError(f"{train.source}: tag '{foreign[0]}' in '{self.tags}' is not BIO (O, B-type or I-type)")
        if tags <= {OUTSIDE}:
            raise DataError(f"{train.source}: column '{self.tags}' has no entity to learn")
        ordered = sorted(tags - {OUTSIDE}, key=lambda tag: (tag[2:], tag[0]))
        return Head("AutoModelForTokenClassification", (OUTSIDE, *ordered), pretokenized=True)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        words = self._words(rows)
        references = self.references(rows, labels) if supervised else None
        ids = {label: index for index, label in enumerate(labels)}
        encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoding]
        examples, truncated = [], 0
        for index, row in enumerate(words):
            first = _first_positions(encoding.word_ids(index))
            example: dict[str, Any] = {key: encoding[key][index] for key in keys}
            example["words"] = [first.get(word, -1) for word in range(len(row))]
            if references is not None:
                example["labels"] = [IGNORED] * len(example["input_ids"])
                for word, position in first.items():
                    example["labels"][position] = ids[references[index][word]]
            truncated += bool(encoding.encodings[index].overflowing)
            examples.append(example)
        return Encoded(examples, truncated)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, tokens, classes)."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "words")}
        logits: Tensor = model(**inputs).logits
        return logits

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        probabilities, best = self.logits(model, batch).float().softmax(-1).max(-1)
        predictions = []
        for row, positions in enumerate(batch["words"]):
            chosen = best[row].tolist()
            certain = probabilities[row].tolist()
            predictions.append(
                {
                    "tags": [labels[chosen[p]] if p >= 0 else OUTSIDE for p in positions],
                    "probabilities": [certain[p] if p >= 0 else 1.0 for p in positions],
                }
            )
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.spans import EntityReport

        predicted, references = self.metric_inputs(predictions, rows, labels)
        values = EntityReport().compute(predictions=predicted, references=references)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(predicted))

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[list[str]], list[list[str]]]:
        return [prediction["tags"] for prediction in predictions], self.references(rows, labels)

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        if pairs is not None:
            raise UsageError("this model tags single texts, not pairs")
        records = []
        for text in texts:
            words = split_words(text)
            offsets = [(start, end) for _, start, end in words]
            records.append({self.tokens: [word for word, _, _ in words], TYPED: (text, offsets)})
        return Rows("input", records, range(1, len(records) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        """Entities with character offsets in the text (for given words: in the words joined by spaces). The
        probability of an entity is that of its least certain word."""
        words = record[self.tokens]
        text, offsets = record.get(TYPED) or (" ".join(words), _offsets(words))
        entities = [
            {
                "type": kind,
                "text": text[offsets[first][0] : offsets[end - 1][1]],
                "start": offsets[first][0],
                "end": offsets[end - 1][1],
                "probability": min(prediction["probabilities"][first:end]),
            }
            for kind, first, end in entity_spans(prediction["tags"])
        ]
        return {"text": text, "entities": entities}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        self._check_lists(rows, self.tokens, "words")
        self._check_lists(rows, self.tags, "tags")
        uneven = [i for i, r in enumerate(rows.records) if len(r[self.tokens]) != len(r[self.tags])]
        refuse_rows(rows, uneven, f"'{self.tokens}' and '{self.tags}' differ in length", "give each word one tag")
        foreign = ((i, tag) for i, record in enumerate(rows.records) for tag in record[self.tags] if tag not in labels)
        refuse_unknown(rows, {index: str(tag) for index, tag in foreign}, labels)
        return [list(record[self.tags]) for record in rows.records]

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        winner = Counter(tag for row in self.references(train, labels) for tag in row).most_common(1)[0][0]
        return [
            {"tags": [winner] * len(row), "probabilities": [1.0] * len(row)}
            for row in (record[self.tokens] for record in rows.records)
        ]

    def _words(self, rows: Rows) -> list[list[str]]:
        self._check_lists(rows, self.tokens, "words")
        values = [record[self.tokens] for record in rows.records]
        others = [i for i, value in enumerate(values) if not all(isinstance(word, str) for word in value)]
        refuse_rows(rows, others, f"'{self.tokens}' has something that is not text", "write each word as text")
        return values

    def _check_lists(self, rows: Rows, column: str, what: str) -> None:
        rows.require(column)
        values = (record[column] for record in rows.records)
        empty = [i for i, value in enumerate(values) if not isinstance(value, list) or not value]
        refuse_rows(rows, empty, f"no list of {what} in '{column}'", "remove the row or fill it in")


def split_words(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) for running text: words, mentions and hashtags whole, punctuation apart."""
    return [(match.group(), match.start(), match.end()) for match in WORD.finditer(text)]


def entity_spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, one past the last word) of each entity; an `I-` that continues nothing starts one."""
    from seqeval.metrics.sequence_labeling import get_entities

    for entity, first, last in get_entities(list(tags)):
        yield entity, first, last + 1


def _offsets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where each word stands in the words joined by spaces."""
    offsets, start = [], 0
    for word in words:
        offsets.append((start, start + len(word)))
        start += len(word) + 1
    return offsets


def _first_positions(word_ids: Sequence[int | None]) -> dict[int, int]:
    """The position of each word's first sub-word. A word may have none: it was cut off, or has no character
    that the tokenizer knows."""
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return first
