"""A tag for every word: named entities and slots in any scheme, and tags without entities, such as parts of speech."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from peftkit.backbones.load import Head
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.errors import UsageError
from peftkit.tasks.base import Batch, Counts, Encoded, Example, Prediction, Scores, Task, refuse_rows
from peftkit.tasks.label_names import distinct
from peftkit.tasks.tagging_schemes import OUTSIDE, Scheme, inside_of
from peftkit.tasks.tags import MISSING, EntityTags, PlainTags, Tags, check_lists
from peftkit.tasks.word_windows import Window, cut, windows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

TYPED = "(typed)"  # where rows_from_text keeps the text and the offsets of its words
WORD = re.compile(r"\w+(?:['’\-.]\w+)*|[@#]\w+|[^\w\s]")
ALIASES = {"iob2": "bio", "bioes": "iobes", "iob": "iob1"}


def _canonical(value: Any) -> Any:
    return ALIASES.get(value, value) if isinstance(value, str) else value


class TokenClassification(Task):
    """Named entities, slots, parts of speech: rows of words with a tag each.

    Entities are read from tags in whatever scheme the data has, learnt and predicted in `scheme`. The first sub-word of
    a word carries its tag; a word that the tokenizer leaves without any is predicted as `O`.

    Rows longer than `max_length` are read in windows that overlap. Each word is learnt once, and predicted once, in the
    window where it has most context on its poorer side, so that nothing is lost; with `long_rows: cut` the words beyond
    `max_length` are `O`, which costs recall and never shortens the test.
    """

    averages: ClassVar[bool] = True
    kind: Literal["token_classification"] = "token_classification"
    tokens: str = "tokens"
    tags: str = "tags"
    tag_names: tuple[str, ...] | None = None
    """Where the data has numbers for tags: the tags, in the order of the numbers from 0."""
    scheme: Annotated[Literal["bio", "iobes", "bilou", "io", "none"], BeforeValidator(_canonical)] = "bio"
    """How entities are learnt; `io` cannot tell neighbours of one type apart, which its scores show. `iob2` is another
    name of bio, `bioes` of iobes. `none`: tags that mark no entities, scored one by one."""
    data_scheme: Annotated[Scheme | None, BeforeValidator(_canonical)] = None
    """The scheme of the data; default: the one that its tags contradict least. Other tags are refused when given."""
    supervise: Literal["first", "all"] = "first"
    """Which sub-words of a word are learnt; with `all` the later ones get the entity's I-. Predictions come from the
    first either way."""
    long_rows: Literal["windows", "cut"] = "windows"
    stride: Annotated[int, Field(ge=0)] | None = None
    """Sub-words that a window shares with the one before it; default: a quarter of `max_length`."""

    @field_validator("tag_names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return distinct(names, "tag_names")

    @model_validator(mode="after")
    def _belong_together(self) -> TokenClassification:
        if self.stride is not None and self.long_rows == "cut":
            raise ValueError("stride is of windows; leave it out with long_rows: cut")
        if self.stride is not None and self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} is not below max_length, which is {self.max_length}")
        if self.scheme == "none" and self.data_scheme is not None:
            raise ValueError("data_scheme is of entities, and scheme 'none' has none; leave it out")
        return self

    @property
    def meaning(self) -> Tags:
        """What the tags stand for."""
        if self.scheme == "none":
            return PlainTags(self.tags, self.tag_names)
        return EntityTags(self.tags, self.tag_names, self.scheme, self.data_scheme)

    @property
    def headline(self) -> str:
        return self.meaning.headline

    def label_column(self) -> str:
        return self.tags

    def spellings(self, labels: Sequence[str]) -> Sequence[str]:
        """The head's labels, and what else the data may spell them as."""
        return self.meaning.spellings(labels)

    def head(self, train: Rows) -> Head:
        return Head("AutoModelForTokenClassification", self.meaning.names(train), pretokenized=True)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        words = self._words(rows)
        references = self.references(rows, labels) if supervised else None
        ids = {label: index for index, label in enumerate(labels)}
        # all of them: where they are cut is decided here, and the tokenizer need not warn of their length
        encoding = tokenizer(words, is_split_into_words=True, verbose=False)
        columns = {key: encoding[key] for key in ("input_ids", "token_type_ids") if key in encoding}
        examples, owners, truncated = [], [], 0
        for index, row in enumerate(words):
            word_ids = encoding.word_ids(index)
            first = _first_positions(word_ids)
            for window in self._windows(word_ids, len(row)):
                example: Example = {key: [column[index][at] for at in window.tokens] for key, column in columns.items()}
                places = {token: position for position, token in enumerate(window.tokens)}
                example["words"] = [places.get(first.get(word, -1), -1) for word in window.words]
                if references is not None:
                    tags = self._token_tags(window, word_ids, first, references[index])
                    example["labels"] = [IGNORED if tag is None else ids[tag] for tag in tags]
                examples.append(example)
                owners.append(index)
            truncated += self.long_rows == "cut" and len(word_ids) > self.max_length
        notes = self.meaning.notes(rows) if supervised else ()
        return Encoded(examples, truncated, None if len(examples) == len(rows) else owners, notes=notes)

    def _windows(self, word_ids: Sequence[int | None], words: int) -> list[Window]:
        if self.long_rows == "cut" and len(word_ids) > self.max_length:
            return [cut(word_ids, words, self.max_length)]
        stride = self.max_length // 4 if self.stride is None else self.stride
        return windows(word_ids, words, self.max_length, stride)

    def _token_tags(
        self, window: Window, word_ids: Sequence[int | None], first: dict[int, int], tags: Sequence[str]
    ) -> Iterator[str | None]:
        """The tag of each token of a window, None where it is not supervised."""
        for token in window.tokens:
            word = word_ids[token]
            if word is None or word not in window.words:
                yield None
            elif token == first[word]:
                yield tags[word]
            else:
                yield inside_of(tags[word], self.scheme) if self.supervise == "all" else None

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, tokens, classes)."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "words")}
        logits: Tensor = model(**inputs).logits
        return logits

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        probabilities, best = self.logits(model, batch).float().softmax(-1).max(-1)
        missing = MISSING if self.scheme == "none" else OUTSIDE
        predictions = []
        for row, positions in enumerate(batch["words"]):
            chosen = best[row].tolist()
            certain = probabilities[row].tolist()
            predictions.append(
                {
                    "tags": [labels[chosen[p]] if p >= 0 else missing for p in positions],
                    "probabilities": [certain[p] if p >= 0 else 1.0 for p in positions],
                }
            )
        return predictions

    def join(
        self, found: Sequence[Prediction], encoded: Encoded, rows: Rows, tokenizer: PreTrainedTokenizerBase
    ) -> list[Prediction]:
        """The windows of a row share its words out in order, so their predictions are put one behind the other."""
        joined: list[Prediction] = [{"tags": [], "probabilities": []} for _ in rows.records]
        for index, one in enumerate(found):
            for name, values in joined[encoded.owner(index)].items():
                values.extend(one[name])
        return joined

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        return self.meaning.score([prediction["tags"] for prediction in predictions], self._aligned(rows), labels)

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        if figure not in (None, self.headline):
            return None
        return self.meaning.counts([prediction["tags"] for prediction in predictions], self._aligned(rows), labels)

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """Lists of tags; without entities, the tag numbers of all words in a row."""
        return self.meaning.metric_inputs([one["tags"] for one in predictions], self._aligned(rows), labels)

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
        """Entities with character offsets in the text (for given words: in the words joined by spaces); the probability
        of an entity is that of its least certain word. Without entities, the same of each word."""
        words, tags = record[self.tokens], prediction["tags"]
        text, offsets = record.get(TYPED) or (" ".join(words), _offsets(words))
        plain = self.scheme == "none"
        spans = self.meaning.spans(tags)
        found = [
            {
                "tag" if plain else "type": name,
                "text": text[offsets[first][0] : offsets[end - 1][1]],
                "start": offsets[first][0],
                "end": offsets[end - 1][1],
                "probability": min(prediction["probabilities"][first:end]),
            }
            for name, first, end in spans
        ]
        return {"text": text, "words" if plain else "entities": found}

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """Tags in the task's scheme."""
        return self.meaning.references(self._aligned(rows), labels)

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        winner = Counter(tag for row in self.references(train, labels) for tag in row).most_common(1)[0][0]
        return [
            {"tags": [winner] * len(row), "probabilities": [1.0] * len(row)}
            for row in (record[self.tokens] for record in rows.records)
        ]

    def _aligned(self, rows: Rows) -> Rows:
        """Rows with a tag for each word."""
        check_lists(rows, self.tokens, "words")
        check_lists(rows, self.tags, "tags")
        uneven = [i for i, r in enumerate(rows.records) if len(r[self.tokens]) != len(r[self.tags])]
        refuse_rows(rows, uneven, f"'{self.tokens}' and '{self.tags}' differ in length", "give each word one tag")
        return rows

    def _words(self, rows: Rows) -> list[list[str]]:
        check_lists(rows, self.tokens, "words")
        values = [record[self.tokens] for record in rows.records]
        others = [i for i, value in enumerate(values) if not all(isinstance(word, str) for word in value)]
        refuse_rows(rows, others, f"'{self.tokens}' has something that is not text", "write each word as text")
        return values


def split_words(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) for running text: words, mentions and hashtags whole, punctuation apart."""
    return [(match.group(), match.start(), match.end()) for match in WORD.finditer(text)]


def _offsets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where each word stands in the words joined by spaces."""
    offsets, start = [], 0
    for word in words:
        offsets.append((start, start + len(word)))
        start += len(word) + 1
    return offsets


def _first_positions(word_ids: Sequence[int | None]) -> dict[int, int]:
    """The position of each word's first sub-word. A word has none where no character is known to the tokenizer."""
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return first
