"""What the tags of words stand for: entities, or each word's own class."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftkit.data.files import Rows
from peftkit.errors import DataError
from peftkit.tasks.base import Counts, Scores, refuse_rows, refuse_unknown
from peftkit.tasks.label_names import by_position, label_text
from peftkit.tasks.tagging_schemes import (
    ENTITY_TAG,
    OUTSIDE,
    PREFIXES,
    Scheme,
    Span,
    contradictions,
    detect,
    entity_spans,
    read_spans,
    tags_of_types,
    type_of,
    write_tags,
)

MISSING = ""
"""The prediction for a word that the model does not get to see, where no tag means nothing."""


@dataclass(frozen=True)
class Tags(ABC):
    """The tags in one column: how they are read, checked and scored."""

    column: str
    given_names: tuple[str, ...] | None
    """Of the tags, where the data has their positions."""
    headline: ClassVar[str]

    def texts(self, rows: Rows) -> list[list[str]]:
        """The tags of each row as text.

        Raises:
            DataError: rows whose tags are no list, or have a gap.
        """
        check_lists(rows, self.column, "tags")
        found = [[label_text(tag) for tag in record[self.column]] for record in rows.records]
        gaps = [index for index, tags in enumerate(found) if None in tags]
        refuse_rows(rows, gaps, f"a word without a tag in '{self.column}'", "give each word one tag")
        return [by_position([str(tag) for tag in tags], self.given_names) for tags in found]

    def written(self, train: Rows) -> set[str]:
        """Every tag that train has, or is known to have."""
        found = {tag for tags in self.texts(train) for tag in tags}
        return set(self.given_names or train.features.get(self.column) or found)

    @abstractmethod
    def names(self, train: Rows) -> tuple[str, ...]:
        """The tags to learn, in the order of the outputs."""

    @abstractmethod
    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        """The right tags of each row, all of them in `labels`."""

    @abstractmethod
    def spans(self, tags: Sequence[str]) -> list[Span]:
        """What `predict` shows of a row's tags."""

    @abstractmethod
    def metric_inputs(
        self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """(predictions, references) as metrics take them."""

    @abstractmethod
    def score(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Scores:
        """Corpus figures."""

    @abstractmethod
    def counts(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Counts:
        """What each row adds to the headline figure."""

    def spellings(self, labels: Sequence[str]) -> Sequence[str]:
        """Of what `labels` stand for, all that the data may have."""
        return labels

    @abstractmethod
    def notes(self, rows: Rows) -> tuple[str, ...]:
        """What is worth saying about the tags of a split."""


@dataclass(frozen=True)
class PlainTags(Tags):
    """Each word's own class, such as its part of speech."""

    headline = "accuracy"

    def names(self, train: Rows) -> tuple[str, ...]:
        ordered = self.given_names or train.features.get(self.column) or tuple(sorted(self.written(train)))
        if len(ordered) < 2:
            raise DataError(f"{train.source}: column '{self.column}' has {len(ordered)} tag; there is nothing to learn")
        return ordered

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        found = self.texts(rows)
        known = set(labels)
        refuse_unknown(rows, _first(found, lambda tag: tag not in known), labels)
        return found

    def spans(self, tags: Sequence[str]) -> list[Span]:
        """Each word by itself."""
        return [(tag, index, index + 1) for index, tag in enumerate(tags)]

    def metric_inputs(
        self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """The tag numbers of all words of all rows; −1 where there is no prediction."""
        ids = {label: index for index, label in enumerate(labels)}
        references = self.references(rows, labels)
        return [ids.get(tag, -1) for tags in predicted for tag in tags], [ids[t] for tags in references for t in tags]

    def score(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.classes import ClassificationReport

        answers, targets = self.metric_inputs(predicted, rows, labels)
        values = ClassificationReport(labels=labels).compute(predictions=answers, references=targets)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(predicted))

    def counts(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Counts:
        """Right tags, of one a word."""
        pairs = list(zip(predicted, self.references(rows, labels), strict=True))
        right = [float(sum(map(operator.eq, found, reference))) for found, reference in pairs]
        return Counts(right, [float(len(reference)) for _, reference in pairs])

    def notes(self, rows: Rows) -> tuple[str, ...]:
        found = {tag for tags in self.texts(rows) for tag in tags} - {OUTSIDE}
        if found and all(ENTITY_TAG.fullmatch(tag) for tag in found):
            return ("the tags look like entities, and are scored word by word; scheme: bio scores whole entities",)
        return ()


@dataclass(frozen=True)
class EntityTags(Tags):
    """Entities, spelt by the tags of their words."""

    scheme: Scheme
    """That is learnt and predicted."""
    data_scheme: Scheme | None
    """Of the rows, where it was given."""
    headline = "entity_f1"

    def names(self, train: Rows) -> tuple[str, ...]:
        self._entity_tags(train)
        written = self.written(train)
        foreign = sorted(tag for tag in written - {OUTSIDE} if not ENTITY_TAG.fullmatch(tag))
        if foreign:
            raise DataError(f"{train.source}: {self._foreign(foreign[0])}")
        types = {type_of(tag) for tag in written - {OUTSIDE}}
        if not types:
            raise DataError(f"{train.source}: column '{self.column}' has no entity to learn")
        return tags_of_types(types, self.scheme)

    def references(self, rows: Rows, labels: Sequence[str]) -> list[list[str]]:
        found = self._entity_tags(rows)
        types = {type_of(label) for label in labels if label != OUTSIDE}
        refuse_unknown(rows, _first(found, lambda tag: tag != OUTSIDE and type_of(tag) not in types), labels)
        converted = _converted(found, self.scheme)
        known = set(labels)
        refuse_unknown(rows, _first(converted, lambda tag: tag not in known), labels)
        return converted

    def spellings(self, labels: Sequence[str]) -> Sequence[str]:
        """The tags of the same types in all schemes."""
        types = {type_of(label) for label in labels if label != OUTSIDE}
        schemes = [self.data_scheme] if self.data_scheme else list(PREFIXES)
        return tuple(dict.fromkeys(tag for scheme in schemes for tag in tags_of_types(types, scheme)))

    def spans(self, tags: Sequence[str]) -> list[Span]:
        """The entities that count in the scores."""
        return entity_spans(tags, self.scheme)

    def metric_inputs(
        self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Tags in the task's scheme; in BIO where that is IO, which would hide that neighbours were run together."""
        if self.scheme == "io":
            return _converted(predicted, "bio"), _converted(self._entity_tags(rows), "bio")
        return [list(tags) for tags in predicted], self.references(rows, labels)

    def score(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Scores:
        from peftkit.metrics.spans import EntityReport

        found, references = self.metric_inputs(predicted, rows, labels)
        report = EntityReport(scheme="bio" if self.scheme == "io" else self.scheme)
        values = report.compute(predictions=found, references=references)
        per_class = values.pop("per_class")
        return Scores(self.headline, values, per_class, len(found))

    def counts(self, predicted: Sequence[Sequence[str]], rows: Rows, labels: Sequence[str]) -> Counts:
        """F1 over all rows: 2 · entities that are right, of those that were found and those that there are."""
        scheme = "bio" if self.scheme == "io" else self.scheme
        found, references = (
            [set(entity_spans(tags, scheme)) for tags in split] for split in self.metric_inputs(predicted, rows, labels)
        )
        pairs = list(zip(found, references, strict=True))
        right = [2.0 * len(one & other) for one, other in pairs]
        return Counts(right, [float(len(one) + len(other)) for one, other in pairs])

    def notes(self, rows: Rows) -> tuple[str, ...]:
        found = self._entity_tags(rows)
        source, wrong = self._source(found, rows)
        notes = [f"tags are {source.upper()}, learnt as {self.scheme.upper()}"] if source != self.scheme else []
        if wrong:
            notes.append(
                f"{wrong:,} tags are not as {source.upper()} has them; entities were read as the CoNLL evaluation does"
            )
        if self.scheme == "io":
            all_of_them = sum(len(read_spans(tags)) for tags in found)
            lost = all_of_them - sum(len(read_spans(tags)) for tags in _converted(found, "io"))
            notes += [f"IO runs {lost:,} of {all_of_them:,} entities into a neighbour of their type"] if lost else []
        return tuple(notes)

    def _source(self, found: Sequence[Sequence[str]], rows: Rows) -> tuple[Scheme, int]:
        """The scheme of the data, and how many tags contradict it."""
        if self.data_scheme is not None:
            return self.data_scheme, contradictions(found, self.data_scheme)
        detected = detect(found)
        if detected is None:
            letters = ", ".join(sorted({f"{tag[0]}-" for tags in found for tag in tags if tag != OUTSIDE}))
            raise DataError(
                f"{rows.source}: '{self.column}' has tags with {letters}, which no scheme has together; IOBES has "
                "B-, I-, E- and S-, BILOU has B-, I-, L- and U-: write all rows in one"
            )
        return detected

    def _entity_tags(self, rows: Rows) -> list[list[str]]:
        found = self.texts(rows)
        foreign = _first(found, lambda tag: tag != OUTSIDE and not self._is_ours(tag))
        if foreign:
            tag = next(iter(foreign.values()))
            places = [index for index, one in foreign.items() if one == tag]
            what, _, mend = self._foreign(tag).partition("; ")
            refuse_rows(rows, places, what, mend)
        return found

    def _is_ours(self, tag: str) -> bool:
        letters = PREFIXES[self.data_scheme] if self.data_scheme else tag[:1]
        return bool(ENTITY_TAG.fullmatch(tag)) and tag[0] in letters

    def _foreign(self, tag: str) -> str:
        if self.data_scheme:
            letters = ", ".join(f"{letter}-type" for letter in PREFIXES[self.data_scheme])
            return f"tag '{tag}' in '{self.column}' is not {self.data_scheme.upper()} (O, {letters}); mend data_scheme"
        return (
            f"tag '{tag}' in '{self.column}' is not of an entity (O, B-type, I-type; also E-, S-, L-, U-); "
            "for tags that mark no entities set scheme: none, and for numbers tag_names"
        )


def _first(rows: Sequence[Sequence[str]], test: Callable[[str], bool]) -> dict[int, str]:
    """Of each row (by index) that has a tag which passes the test, the first."""
    found = ((index, next(filter(test, tags), None)) for index, tags in enumerate(rows))
    return {index: tag for index, tag in found if tag is not None}


def _converted(rows: Sequence[Sequence[str]], scheme: Scheme) -> list[list[str]]:
    return [write_tags(read_spans(tags), len(tags), scheme) for tags in rows]


def check_lists(rows: Rows, column: str, what: str) -> None:
    """Refuse rows without a filled list in `column`."""
    rows.require(column)
    values = (record[column] for record in rows.records)
    empty = [i for i, value in enumerate(values) if not isinstance(value, list) or not value]
    refuse_rows(rows, empty, f"no list of {what} in '{column}'", "remove the row or fill it in")
