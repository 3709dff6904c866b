"""What the model gets to see: lengths, what is supervised, end tokens, unknown tokens."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peftkit.audit.findings import KEPT, Finding, finding
from peftkit.audit.settings import AuditSettings
from peftkit.data.collate import IGNORED
from peftkit.tasks.base import Example

if TYPE_CHECKING:
    from peftkit.prepare import Split

Kind = Literal["classes", "marks", "written", "other"]
"""What labels are: classes of rows or words, yes or no for each label, tokens that are written, or something else."""
QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BARS = 20


@dataclass
class Tokens:
    """Figures of the encoded examples of one split, added up part by part; a few bytes an example are kept."""

    lengths: array[int] = field(default_factory=lambda: array("I"))
    supervised: int = 0
    """Tokens that are learnt or scored, where labels stand at tokens."""
    masked: list[str] = field(default_factory=list)
    """Where the first examples are that have none."""
    masked_count: int = 0
    answered: int = 0
    """Examples in which an answer is learnt, and not the whole text."""
    with_end: int = 0
    """Examples whose end token is supervised."""
    unknown: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    dropped_places: dict[str, list[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    """Where the first examples are that hold special tokens alone."""
    empty_count: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    """How often each label id is supervised, where labels are classes."""

    def add(self, split: Split, kind: Kind) -> None:
        """Take the examples of (a part of) a split into account."""
        encoded, tokenizer = split.encoded, split.tokenizer
        self.truncated += encoded.truncated
        self.dropped.update(encoded.dropped.values())
        for row, reason in encoded.dropped.items():
            places = self.dropped_places.setdefault(reason, [])
            if len(places) < KEPT:
                places.append(split.rows.where(row))
        few, unknown, ends = tokenizer.num_special_tokens_to_add(), _unknown(tokenizer), set(tokenizer.all_special_ids)
        for index, example in enumerate(encoded.examples):
            ids = example["input_ids"]
            self.lengths.append(len(ids))
            if unknown is not None:
                self.unknown += ids.count(unknown)
            if len(ids) <= few:
                self.empty_count += 1
                self._keep(self.empty, split, index)
            labels = example.get("labels")
            if kind == "classes" and isinstance(labels, int):
                self.labels[labels] += 1
            elif kind == "marks" and labels is not None:
                self.labels.update(label for label, on in enumerate(labels) if on)
            elif kind in ("classes", "written") and labels is not None:
                self._add_labels(labels, ends, split, index, kind == "written")

    def _add_labels(self, labels: list[int], ends: set[int], split: Split, index: int, written: bool) -> None:
        supervised = len(labels) - labels.count(IGNORED)
        self.supervised += supervised
        if not supervised:
            self.masked_count += 1
            self._keep(self.masked, split, index)
        if written:
            self.answered += supervised < len(labels) or len(labels) != self.lengths[-1]
            self.with_end += not ends.isdisjoint(labels)
        else:
            self.labels.update(labels)
            del self.labels[IGNORED]

    def _keep(self, places: list[str], split: Split, index: int) -> None:
        if len(places) < KEPT:
            places.append(split.where(index))

    def quantiles(self) -> dict[str, float]:
        """Lengths in tokens: the smallest, some quantiles, the largest, and the mean."""
        import numpy as np

        if not self.lengths:
            return {}
        lengths = np.frombuffer(self.lengths, dtype=np.uint32)
        values = np.percentile(lengths, QUANTILES)
        names = ("min", *(f"p{one}" for one in QUANTILES[1:-1]), "max")
        return {name: float(value) for name, value in zip(names, values, strict=True)} | {"mean": float(lengths.mean())}

    def histogram(self) -> list[tuple[int, int]]:
        """(the shortest length in a bar, examples), for bars of equal width."""
        import numpy as np

        if not self.lengths:
            return []
        lengths = np.frombuffer(self.lengths, dtype=np.uint32)
        width = max(1, -(-(int(lengths.max()) + 1) // BARS))
        counts = np.bincount(lengths // width)
        return [(index * width, int(count)) for index, count in enumerate(counts)]


def token_findings(split: str, tokens: Tokens, rows: int, settings: AuditSettings) -> Iterator[Finding]:
    """Faults that only the tokens show."""
    examples = max(1, len(tokens.lengths))
    if tokens.truncated:
        what = f"{tokens.truncated:,} of {rows:,} rows are cut"
        yield finding("truncated", split, tokens.truncated, what, share=tokens.truncated / rows)
    for reason, count in tokens.dropped.items():
        what = f"{count:,} of {rows:,} rows: {reason}"
        yield finding("dropped", split, count, what, tokens.dropped_places[reason], tokens.dropped.total() / rows)
    if tokens.masked_count:
        share = tokens.masked_count / examples
        what = f"nothing is supervised in {tokens.masked_count:,} of {examples:,} examples"
        yield finding("all-masked", split, tokens.masked_count, what, tokens.masked, share)
    if tokens.empty_count:
        what = f"no tokens in {tokens.empty_count:,} of {examples:,} examples"
        yield finding("no-tokens", split, tokens.empty_count, what, tokens.empty, tokens.empty_count / examples)
    share = tokens.unknown / max(1, sum(tokens.lengths))
    if share > settings.unknown_tokens:
        what = f"{100 * share:.0f} % of the tokens are unknown to the vocabulary"
        yield finding("unknown-tokens", split, tokens.unknown, what, share=share)
    if tokens.answered > examples / 2 and not tokens.with_end:
        what = f"the end token is supervised in none of {examples:,} examples"
        yield finding("no-end-token", split, examples, what, share=1.0)


def padding_findings(tokenizer: Any, tokens: Tokens) -> Iterator[Finding]:
    """Whether padding and the end of a text are one token, where text is written."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id and tokens.answered:
        what = f"'{tokenizer.pad_token}' is both; the end is supervised in {tokens.with_end:,} examples"
        yield finding("pad-is-end-token", "train", tokens.with_end, what)


def pieces(example: Example, tokenizer: Any, labels: Sequence[str]) -> list[tuple[str, str]]:
    """(text, mark) of an example's tokens: the mark is empty where nothing is supervised, else what is learnt there."""
    ids, wanted = example["input_ids"], example.get("labels")
    if not isinstance(wanted, list) or len(wanted) != len(ids):
        return [(tokenizer.decode(ids), ""), *_answer(wanted, tokenizer, labels)]
    marks = [_mark(label, labels) for label in wanted]
    found, start = list[tuple[str, str]](), 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or marks[index] != marks[start]:
            found.append((tokenizer.decode(ids[start:index]), marks[start]))
            start = index
    return found


def _mark(label: int, labels: Sequence[str]) -> str:
    if label == IGNORED:
        return ""
    return labels[label] if labels else "learnt"


def _unknown(tokenizer: Any) -> int | None:
    """The id that stands for what is not in the vocabulary; None where one token has every special role, as GPT-2's."""
    token: int | None = tokenizer.unk_token_id
    return None if token in (tokenizer.eos_token_id, tokenizer.pad_token_id) else token


def _answer(wanted: Any, tokenizer: Any, labels: Sequence[str]) -> list[tuple[str, str]]:
    """What is learnt of an example as a whole, or written by a decoder."""
    if isinstance(wanted, int | float):
        return [("", labels[wanted] if labels and isinstance(wanted, int) else str(wanted))]
    if not isinstance(wanted, list):
        return []
    if labels and len(wanted) == len(labels):
        return [("", ", ".join(name for name, on in zip(labels, wanted, strict=True) if on) or "none")]
    if labels:
        return [("", str(wanted))]
    return [(tokenizer.decode([label for label in wanted if label != IGNORED]), "learnt")]
