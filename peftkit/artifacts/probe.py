"""What a model answers on probe rows: the same code where a run is merged and where its merged model is read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.checkpoints import bytes_of
from peftkit.artifacts.rounding import rounded
from peftkit.backbones.load import Head
from peftkit.config import Run
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows
from peftkit.errors import DataError, UsageError
from peftkit.prepare import Split, encode_split
from peftkit.tasks.base import Example, Prediction, Task
from peftkit.tasks.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn
    from transformers import PreTrainedTokenizerBase

LAST_TOKENS = 16
"""Supervised tokens of each row that language models are compared on."""
MOST_LOGITS = 2**26
"""Numbers that are held to compare; 256 MiB."""


@dataclass
class Answers:
    """Of a model, on a split."""

    logits: list[Tensor] = field(default_factory=list)
    """In float32, of each of the first examples: of its real tokens, or of a language model's last supervised ones."""
    score: dict[str, Any] | None = None
    """Name and value of the headline figure over the whole split, and all others; None where rows have no labels."""


def encoded_probe(run: Run, rows: Rows, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, bool]:
    """The rows as the run's task encodes them, and whether they have labels to score.

    Raises:
        DataError, UsageError: rows that the task cannot read; of a language model, rows without what it should write.
    """
    try:
        return encode_split(run, rows.source, rows, head, tokenizer), True
    except (DataError, UsageError):
        if isinstance(run.task, LanguageModel):
            raise
        return encode_split(run, rows.source, rows, head, tokenizer, supervised=False), False


def examples_sha256(split: Split) -> str:
    """A hash of the token ids and labels of a split, and of the order of the labels."""
    return hashlib.sha256(json.dumps([split.labels, list(split.encoded.examples)]).encode()).hexdigest()


def ask(model: nn.Module, run: Run, split: Split, scored: bool, examples: int | None = None) -> Answers:
    """The answers of a model, in evaluation mode.

    Args:
        scored: the rows have labels.
        examples: how many examples' logits are kept; default: as many as `MOST_LOGITS` allow, and one batch at least.
    """
    import torch

    task, answers, predictions, held = run.task.while_training(), Answers(), [], 0
    model.eval()
    with torch.no_grad():
        for indices, one in _batches(split):
            wanted = held < MOST_LOGITS if examples is None else len(answers.logits) < examples
            if not wanted and not scored:
                break
            if wanted:
                rows = _logits(model, task, split, indices)
                answers.logits += rows
                held += sum(row.numel() for row in rows)
            if scored:
                predictions += task.predict(model, collate(one, split.pad_id), split.labels)
    if scored:
        answers.score = _score(task, split, predictions)
    return answers


def _score(task: Task, split: Split, predictions: list[Prediction]) -> dict[str, Any]:
    found = task.score(task.join(predictions, split.encoded, split.rows, split.tokenizer), split.rows, split.labels)
    return {"name": found.headline, "value": float(found.value), "values": found.values}


def _batches(split: Split) -> Iterator[tuple[list[int], list[Example]]]:
    """(indices, examples) in the order of the split."""
    examples = split.encoded.examples
    for start in range(0, len(examples), split.batch_size):
        indices = list(range(start, min(start + split.batch_size, len(examples))))
        yield indices, [examples[index] for index in indices]


def _logits(model: nn.Module, task: Task, split: Split, indices: list[int]) -> list[Tensor]:
    batch = collate([_ending(task, split.encoded.examples[index]) for index in indices], split.pad_id)
    if isinstance(task, LanguageModel):
        return [logits.float() for logits in task.split_logits(model, batch)]
    logits = task.logits(model, batch).float()
    lengths = [split.encoded.lengths[index] for index in indices]
    return [row if logits.ndim == 2 else row[:length] for row, length in zip(logits, lengths, strict=True)]


def _ending(task: Task, example: Example) -> Example:
    """Of a language model's example, only the last supervised tokens; all that stands before decides those too."""
    if not isinstance(task, LanguageModel):
        return example
    labels = example["labels"]
    kept = [position for position, label in enumerate(labels) if label != IGNORED][-LAST_TOKENS:]
    return example | {"labels": [label if position in kept else IGNORED for position, label in enumerate(labels)]}


def digests(model: nn.Module, cast: dtype | None) -> dict[str, str]:
    """A hash of each tensor of a model, by its name there, once its floating point numbers are cast, if they are; tied
    ones count under each of their names."""
    known: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known[id(tensor)] = digest(tensor.detach(), cast)
        found[name] = known[id(tensor)]
    return found


def digest(tensor: Tensor, cast: dtype | None) -> str:
    """A hash of the bytes of a tensor, of which floating point numbers are cast before."""
    values = tensor if cast is None else rounded(tensor, cast)
    return hashlib.sha256(bytes_of(values.contiguous())).hexdigest()
