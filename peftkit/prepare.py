"""From a run's description to encoded splits: rows, label order, tokens. Needs the tokenizer, not the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftkit.backbones.load import Head, load_tokenizer
from peftkit.config import Run
from peftkit.data.collate import IGNORED
from peftkit.data.files import Rows
from peftkit.data.sources import Splits
from peftkit.tasks.base import Encoded, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """Raw rows and their token ids; index i is the same example in both."""

    name: str
    rows: Rows
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation need to know about the data."""

    train: Split
    dev: Split
    test: Split
    """The test split; dev again where the data has no test, which `notes` says."""
    head: Head
    tokenizer: PreTrainedTokenizerBase
    class_weights: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the head's outputs."""
        return self.head.labels

    @property
    def pad_id(self) -> int:
        """The id that fills batches up."""
        return int(self.tokenizer.pad_token_id or 0)


def prepare(run: Run, splits: Splits | None = None) -> Prepared:
    """Read (unless given), check and encode the data of a run.

    Raises:
        UsageError: a file or column that is not there.
        DataError: rows that would make the run worthless, with file and line.
    """
    splits = splits or run.task.splits()
    head = run.task.head(splits.train)
    tokenizer = load_tokenizer(run.backbone, head.pretokenized)

    def encoded(name: str, rows: Rows) -> Split:
        return Split(name, rows, run.task.encode(rows, tokenizer, head.labels))

    train, dev = encoded("train", splits.train), encoded("dev", splits.dev)
    test = encoded("test", splits.test) if splits.test is not None else dev
    notes = [
        *splits.notes,
        *(_truncation(run.task, split) for split in {train.name: train, test.name: test}.values()),
    ]
    if splits.test is None:
        notes.append("no test split: the final figures are of dev, which chose the weights: read them with care")
    counts = Counter(_label_ids(train))
    weights = run.task.loss.class_weights([counts[index] for index in range(len(head.labels))])
    return Prepared(train, dev, test, head, tokenizer, tuple(weights), tuple(note for note in notes if note))


def _label_ids(split: Split) -> list[int]:
    found: list[int] = []
    for example in split.encoded.examples:
        labels = example["labels"]
        found.extend([labels] if isinstance(labels, int) else [one for one in labels if one != IGNORED])
    return found


def _truncation(task: Task, split: Split) -> str:
    cut = split.encoded.truncated
    if not cut:
        return ""
    share = 100 * cut / len(split)
    return f"{split.name}: {cut:,} of {len(split):,} rows ({share:.1f} %) are cut at {task.max_length} tokens"
