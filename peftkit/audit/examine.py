"""The audit: all checks on all splits of a run, from its files or from what training has prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from peftkit.audit.columns import column_findings, header_findings
from peftkit.audit.findings import Finding, finding, graded
from peftkit.audit.labels import Labels, label_findings, read_labels, train_findings, unknown_findings
from peftkit.audit.outcome import Report, Shown, SplitReport
from peftkit.audit.repeats import conflict_findings, duplicate_findings, hashed, overlap_findings, repeated
from peftkit.audit.texts import text_findings
from peftkit.audit.tokens import Kind, Tokens, padding_findings, pieces, token_findings
from peftkit.backbones.load import Head, load_tokenizer
from peftkit.config import Run
from peftkit.console import say
from peftkit.data.rows import Rows
from peftkit.errors import DataError
from peftkit.prepare import Prepared, Split, encode_split
from peftkit.tasks.base import Task
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.token_classification import TokenClassification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 50_000
"""Rows that are encoded at once: their tokens need some 100 MB and are then let go."""
OVERLAPS = (("dev", "train", "overlap-dev"), ("test", "train", "overlap-test"), ("test", "dev", "overlap-dev-test"))
MISPLACED = ("header-row", "swapped-row", "shifted-row")
"""What explains a label that no other row has."""
WRONG_COLUMN = ("label-per-row", "swapped-columns")
"""What makes all else about labels meaningless."""
MAY_BE_REFUSED = ("empty-text", "not-text", "missing-label", "unknown-label", "nul-character", "lone-surrogate")
Progress = Callable[[str, int], None]
"""Told the split and how many of its rows are done."""


def audit(run: Run, data: Prepared) -> Report:
    """Check the data that training is about to start on, and say what was found in a line each.

    Raises:
        DataError: findings that make the run worthless, unless they are allowed by name.
    """
    splits = {split.name: split for split in (data.train, data.dev, data.test)}
    rows = {name: split.rows for name, split in splits.items()}
    tokens = {name: Tokens() for name in splits}
    for name, split in splits.items():
        tokens[name].add(split, kind_of(run.task, data.head.labels))
    report = _report(run, rows, tokens, row_findings(run, rows, data.head.labels), data.head.labels, data.tokenizer)
    for line in report.lines():
        say(line)
    report.refuse()
    return report


def audit_run(run: Run, progress: Progress = lambda split, rows: None) -> Report:
    """The whole report of a run's data, read part by part; rows that the task refuses become findings.

    Raises:
        UsageError: a file or column that is not there.
    """
    try:
        splits = run.task.splits()
        rows = {"train": splits.train, "dev": splits.dev} | ({"test": splits.test} if splits.test else {})
        for one in rows.values():
            one.head(1000).require(*filter(None, [run.task.label_column()]))
    except DataError as error:
        return Report((), (finding("refused", "all", 1, str(error)),), (), ())
    try:
        head = run.task.head(splits.train)
    except DataError as error:
        refused = [finding("refused", "train", 1, str(error)), *row_findings(run, rows, ())]
        return _report(run, rows, {}, refused, (), None, splits.notes)
    tokenizer = load_tokenizer(run.backbone, head.pretokenized)
    if head.new_tokens:
        from peftkit.backbones.new_tokens import add_to_tokenizer

        add_to_tokenizer(tokenizer, head.new_tokens)
    encoder = _Encoder(run, tokenizer, head, progress)
    found = row_findings(run, rows, head.labels)
    encoder.supervised = not any(one.name in WRONG_COLUMN for one in found)
    findings = [encoder.judged(one, rows[one.split]) for one in found]
    tokens = {name: encoder.tokens(name, one, findings) for name, one in rows.items()}
    findings += encoder.refused
    return _report(run, rows, tokens, findings, head.labels, tokenizer, splits.notes, encoder.shown)


def row_findings(run: Run, splits: Mapping[str, Rows], names: Sequence[str]) -> list[Finding]:
    """What the rows show without a tokenizer; `names` are the labels of the head."""
    task, settings = run.task, run.audit
    columns, label = task.text_columns(splits["train"]), task.label_column()
    found = [one for split, rows in splits.items() for one in header_findings(split, rows)]
    found += chain.from_iterable(text_findings(split, rows, columns, settings) for split, rows in splits.items())
    labels = {}
    if label is not None:
        configured = getattr(task, "labels", None) or getattr(task, "tag_names", None)
        labels = {split: read_labels(split, rows, label, configured) for split, rows in splits.items()}
        misplaced = list(chain.from_iterable(column_findings(one, columns, settings) for one in labels.values()))
        explained = {
            i for one in (*found, *misplaced) if one.split == "train" and one.name in MISPLACED for i in one.indices
        }
        found += misplaced
        found += chain.from_iterable(label_findings(one) for one in labels.values())
        if not any(one.name in WRONG_COLUMN for one in misplaced):
            meant = configured or splits["train"].features.get(label, ())
            found += train_findings(labels["train"], meant, explained, settings)
            spelt = task.spellings(names) if isinstance(task, TokenClassification) else names
            found += _unknown(labels, spelt)
        else:
            return found
    return [*found, *_of_repeats(splits, columns, labels)]


def _unknown(labels: Mapping[str, Labels], names: Sequence[str]) -> Iterator[Finding]:
    known = names or tuple(labels["train"].counts)
    for split, one in labels.items():
        if split != "train" or names:
            yield from unknown_findings(one, known)


def _of_repeats(splits: Mapping[str, Rows], columns: Sequence[str], labels: Mapping[str, Labels]) -> Iterator[Finding]:
    ready = {split: hashed(split, rows, columns) for split, rows in splits.items()}
    for split, one in ready.items():
        duplicates = repeated(one)
        yield from duplicate_findings(one, duplicates)
        if split in labels:
            yield from conflict_findings(one, duplicates, labels[split].texts)
    for split, other, name in OVERLAPS:
        if split in ready:
            yield from overlap_findings(name, ready[split], ready[other], by_length=not labels)


def kind_of(task: Task, names: Sequence[str]) -> Kind:
    """What the labels of the task's examples are."""
    if isinstance(task, LanguageModel):
        return "written"
    if task.outputs == "marks":
        return "marks"
    return "classes" if task.label_column() and names else "other"


class _Encoder:
    """Encodes a split part by part, without the rows that the task refuses."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, head: Head, progress: Progress) -> None:
        self.run, self.tokenizer, self.head, self.progress = run, tokenizer, head, progress
        self.supervised = True
        """False where the column of labels is not one: texts are encoded alone."""
        self.refused: list[Finding] = []
        self.shown: list[Shown] = []

    def judged(self, one: Finding, rows: Rows) -> Finding:
        """The finding as an error where the task refuses such a row."""
        if one.name not in MAY_BE_REFUSED or not one.indices:
            return one
        try:
            encoded = self.run.task.encode(rows.take(one.indices[:1]), self.tokenizer, self.head.labels)
            refused = bool(encoded.dropped) and one.split != "train"
        except (DataError, UnicodeError, TypeError):
            refused = True
        return dataclasses.replace(one, severity="error") if refused else one

    def tokens(self, name: str, rows: Rows, findings: Sequence[Finding]) -> Tokens:
        """Figures of a split's tokens."""
        refused = {i for one in findings if one.split == name and one.severity == "error" for i in one.indices}
        kept = rows.take(i for i in range(len(rows)) if i not in refused) if refused else rows
        tokens, kind = Tokens(), kind_of(self.run.task, self.head.labels)
        for start in range(0, len(kept), PART):
            part = kept.part(start, start + PART)
            try:
                split = encode_split(self.run, name, part, self.head, self.tokenizer, self.supervised)
            except DataError as error:
                self.refused.append(finding("refused", name, 1, str(error)))
                continue
            tokens.add(split, kind)
            if not self.shown:
                self.shown = list(shown(split))
            self.progress(name, len(part))
        return tokens


def shown(split: Split) -> Iterator[Shown]:
    """The first three examples, the shortest and the longest."""
    lengths = split.encoded.lengths or [0]
    chosen = [
        0,
        1,
        2,
        min(range(len(lengths)), key=lengths.__getitem__),
        max(range(len(lengths)), key=lengths.__getitem__),
    ]
    for index in dict.fromkeys(one for one in chosen if one < len(split.encoded.examples)):
        yield Shown(split.where(index), tuple(pieces(split.encoded.examples[index], split.tokenizer, split.labels)))


def _report(
    run: Run,
    rows: Mapping[str, Rows],
    tokens: Mapping[str, Tokens],
    findings: Sequence[Finding],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    notes: Sequence[str] = (),
    examples: Sequence[Shown] = (),
) -> Report:
    found = list(findings)
    for name, one in tokens.items():
        found += token_findings(name, one, len(rows[name]), run.audit)
    if tokenizer is not None:
        found += padding_findings(tokenizer, tokens["train"])
    splits = (SplitReport.of(name, rows[name], tokens.get(name, Tokens()), labels) for name in rows)
    return Report(tuple(splits), tuple(graded(found, run.audit)), tuple(examples), tuple(notes))
