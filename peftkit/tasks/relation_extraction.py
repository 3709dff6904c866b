"""Which relation holds between two entities that are marked in a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import field_validator, model_validator

from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.errors import DataError, UsageError
from peftkit.metrics.relations import micro_scores, semeval_scores
from peftkit.schema import did_you_mean
from peftkit.tasks.base import Batch, Counts, Encoded, Example, Prediction, Scores, Task, refuse_rows
from peftkit.tasks.columns import texts_in
from peftkit.tasks.entity_markers import (
    Markers,
    as_words,
    kept_tokens,
    marked,
    refuse_outside,
    refuse_unmarked,
    spans_in,
)
from peftkit.tasks.label_names import distinct
from peftkit.tasks.problems import SingleLabel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class RelationExtraction(Task):
    """Rows of a text with two entities, and a label: `The <e1>author</e1> of a <e2>keygen</e2>`.

    The markers become tokens of their own, whose embeddings train with every method (the entity markers of Soares et
    al. 2019, figure 3). Texts that are too long are cut around the entities.
    """

    averages: ClassVar[bool] = True
    kind: Literal["relation_extraction"] = "relation_extraction"
    text: str = "text"
    label: str = "label"
    markers: Markers = ("<e1>", "</e1>", "<e2>", "</e2>")
    """Before and after the first entity, before and after the second."""
    entities: tuple[str, str] | None = None
    """Columns of the entities' places where the text is not marked: [start, end) in characters under the name itself,
    or numbers under name_start and name_end. Typed texts are marked always."""
    labels: tuple[str, ...] | None = None
    """Label order, fixed for good. Default: alphabetically."""
    pooling: Literal["cls", "markers"] = "cls"
    """`cls`: the architecture's own head, on the first token of encoders and the last of decoders (figure 3d).
    `markers`: a linear layer on the mean of the states at both opening markers, which equals the mean of a token
    classifier's logits there (figure 3f has both states side by side); for encoders: decoders have not read the entity
    by then."""
    scoring: Literal["micro_f1", "semeval"] = "micro_f1"
    """`micro_f1`: over all labels but `no_relation`, as in TACRED. `semeval`: SemEval-2010 Task 8's macro F1."""
    no_relation: str | None = None
    """The label that says that there is no relation, left out of the scores; under `semeval`, `Other` unless given."""

    @field_validator("markers")
    @classmethod
    def _tell_apart(cls, markers: Markers) -> Markers:
        if any(not one.strip() or one != one.strip() for one in markers):
            raise ValueError("markers must not be blank, or begin or end with white space")
        if any(one in other for i, one in enumerate(markers) for j, other in enumerate(markers) if i != j):
            raise ValueError("markers must be four, none of them a part of another")
        return markers

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return distinct(labels, "labels")

    @model_validator(mode="after")
    def _others(self) -> RelationExtraction:
        if self.scoring == "semeval" and "no_relation" not in self.model_fields_set:
            object.__setattr__(self, "no_relation", "Other")
        return self

    @property
    def headline(self) -> str:
        return "macro_f1" if self.scoring == "semeval" else "micro_f1"

    @property
    def _classes(self) -> SingleLabel:
        """Labels, as sequence classification reads them."""
        return SingleLabel(cast(Any, self))

    def label_column(self) -> str:
        return self.label

    def head(self, train: Rows) -> Head:
        names = self._classes.names(train)
        if self.no_relation is not None and self.no_relation not in names:
            near = did_you_mean(self.no_relation, names)
            raise DataError(f"{train.source}: no label '{self.no_relation}', which is task.no_relation{near}")
        classes = {"cls": "AutoModelForSequenceClassification", "markers": "AutoModelForTokenClassification"}
        return Head(classes[self.pooling], names, new_tokens=self.markers)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool = True
    ) -> Encoded:
        texts = [as_words(text, self.markers) for text in self._marked(rows)]
        encoding = tokenizer(texts, truncation=False, verbose=False)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoding]
        markers = cast(list[int], tokenizer.convert_tokens_to_ids(list(self.markers)))
        kept = [self._kept(one, markers) for one in encoding.encodings]
        whole = "the two entities alone are longer"
        long = [index for index, one in enumerate(kept) if one is None]
        refuse_rows(rows, long, f"{whole} than {self.max_length} tokens", "raise task.max_length")
        examples: list[Example] = []
        for index, places in enumerate(kept):
            example: Example = {key: [encoding[key][index][place] for place in places or ()] for key in keys}
            if self.pooling == "markers":
                example["markers"] = [example["input_ids"].index(marker) for marker in markers[::2]]
            examples.append(example)
        if supervised:
            for example, target in zip(examples, self._classes.targets(rows, labels), strict=True):
                example["labels"] = target
        cut = sum(len(places or ()) < len(one.ids) for places, one in zip(kept, encoding.encodings, strict=True))
        return Encoded(examples, cut)

    def _kept(self, encoding: Any, markers: Sequence[int]) -> list[int] | None:
        """The positions that stay: special tokens around the text, and of the text what `kept_tokens` keeps."""
        text = [position for position, part in enumerate(encoding.sequence_ids) if part == 0]
        places = [encoding.ids.index(marker) - text[0] for marker in markers]
        entities = [(places[0], places[1] + 1), (places[2], places[3] + 1)]
        room = self.max_length - (len(encoding.ids) - len(text))
        inside = kept_tokens(len(text), room, entities)
        if inside is None:
            return None
        behind = range(text[-1] + 1, len(encoding.ids))
        return [*range(text[0]), *(text[0] + place for place in inside), *behind]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape (examples, classes)."""
        import torch

        logits: Tensor = model(
            **{key: value for key, value in batch.items() if key not in ("labels", "markers")}
        ).logits
        if self.pooling == "cls":
            return logits
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        return logits[rows, torch.tensor(batch["markers"], device=logits.device)].mean(1)

    def supervised_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.logits(model, batch), batch["labels"]

    def predict(self, model: nn.Module, batch: Batch, labels: Sequence[str]) -> list[Prediction]:
        return self._classes.predictions(self.logits(model, batch).float(), labels)

    def score(self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]) -> Scores:
        predicted = [prediction["label"] for prediction in predictions]
        references = self.references(rows, labels)
        if self.scoring == "semeval":
            values, per_class = semeval_scores(predicted, references, self.no_relation)
        else:
            values, per_class = micro_scores(predicted, references, labels, self.no_relation)
        return Scores(self.headline, values, per_class, len(predicted))

    def counts(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str], figure: str | None = None
    ) -> Counts | None:
        """Micro F1: twice the right relations, of those that are predicted and those that are true."""
        if figure not in (None, self.headline) or self.scoring == "semeval":
            return None
        pairs = zip((one["label"] for one in predictions), self.references(rows, labels), strict=True)
        given = [[label != self.no_relation for label in pair] + [pair[0] == pair[1]] for pair in pairs]
        right = [2.0 * (predicted and same) for predicted, _, same in given]
        return Counts(right, [float(predicted + true) for predicted, true, _ in given])

    def metric_inputs(
        self, predictions: Sequence[Prediction], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Class ids."""
        return self._classes.answers(predictions, labels), self._classes.targets(rows, labels)

    def rows_from_text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Rows:
        if pairs is not None:
            raise UsageError("this model takes single texts with both entities marked, not pairs")
        return Rows("input", [{self.text: text} for text in texts], range(1, len(texts) + 1))

    def describe(self, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
        return {"text": record[self.text]} | prediction

    def references(self, rows: Rows, labels: Sequence[str]) -> list[str]:
        return self._classes.references(rows, labels)

    def majority(self, train: Rows, rows: Rows, labels: Sequence[str]) -> list[Prediction]:
        """The most frequent label that is a relation; any other answer scores nothing."""
        counts = Counter(one for one in self.references(train, labels) if one != self.no_relation)
        winner = counts.most_common(1)[0][0]
        chances = {label: float(label == winner) for label in labels}
        return [{"label": winner, "probability": 1.0, "probabilities": chances}] * len(rows)

    def _marked(self, rows: Rows) -> list[str]:
        """The texts with both entities marked; raises where one is not."""
        texts = texts_in(rows, self.text)
        if self.entities and not self._are_typed(rows):
            spans = spans_in(rows, self.entities)
            refuse_outside(rows, texts, spans)
            texts = [marked(text, both, self.markers) for text, both in zip(texts, spans, strict=True)]
        refuse_unmarked(rows, texts, self.markers)
        return texts

    def _are_typed(self, rows: Rows) -> bool:
        """Whether they came from `rows_from_text`, where a person marks what a column would name."""
        return rows.column_names == (self.text,)
