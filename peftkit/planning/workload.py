"""Which batches a run computes: the ones that decide its peak, and how much there is of all.

From the data where they are at hand, the very micro-batches of the run's seed; else the longest that could be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.backbones.load import Head
from peftkit.config import Run
from peftkit.data.collate import IGNORED
from peftkit.prepare import Prepared, Split
from peftkit.tasks import LabelWords, QuestionAnswering, RelationExtraction, Seq2Seq, SequenceClassification
from peftkit.tasks.base import Example, Task
from peftkit.tasks.language_model import LanguageModel
from peftkit.training import batches

MOST_STEPS = 2000
"""Steps whose batches are looked through; every epoch has the longest example in it."""
PASSES = 2
"""Epochs that are looked through."""
Weigh = Callable[[int, int, int], float]
"""About what a batch of (rows, longest, supervised items) keeps."""


@dataclass(frozen=True)
class Workload:
    """What a run computes."""

    micro_batches: tuple[tuple[Example, ...], ...]
    """The one with the highest expected peak, and the next of its step where there is one, in one process."""
    evaluation: tuple[Example, ...]
    """The largest batch of dev and test."""
    steps: int
    step_tokens: float
    """Tokens of a step in one process, padding included, on average."""
    step_parts: float
    """Micro-batches of a step in one process, on average."""
    evaluation_tokens: float
    """Tokens of all evaluations of a run, padding included, over all processes."""
    pad_id: int
    class_weights: tuple[float, ...]
    note: str
    """Where these batches come from."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the first micro-batch."""
        return _shape(self.micro_batches[0])

    @property
    def evaluation_shape(self) -> tuple[int, int]:
        """Rows and tokens of the largest batch of an evaluation."""
        return _shape(self.evaluation)


def from_data(run: Run, data: Prepared, processes: int, weigh: Weigh) -> Workload:
    """The batches of a run whose data are encoded."""
    training, examples = run.training, data.train.encoded.examples
    lengths = data.train.encoded.lengths
    supervised = [_supervised(example) for example in examples]
    steps = training.total_steps(len(examples)) if run.method.trains else 0
    seen = min(max(steps, 1), MOST_STEPS, PASSES * training.steps_per_epoch(len(examples)))
    ahead = batches.steps(lengths, training.batch_size, training.seed, training.group_by_length)
    best, tokens, parts_seen = -1.0, 0, 0
    chosen: tuple[tuple[int, ...], ...] = ()
    for _, batch in itertools.islice(ahead, seen):
        cut = (training.micro_batch_size, processes, 0, training.micro_batch_tokens)
        parts = batches.micro_batches(batch, lengths, *cut)
        parts_seen += len(parts)
        for index, part in enumerate(parts):
            longest = max(lengths[one] for one in part.indices)
            tokens += longest * len(part.indices)
            weight = weigh(len(part.indices), longest, sum(supervised[one] for one in part.indices))
            # later ones of a step have gradients beside them, hence the next too
            if weight > best:
                following = parts[index + 1].indices if index + 1 < len(parts) else ()
                best, chosen = weight, (part.indices, following)
    splits = [data.dev, data.test] if data.test is not data.dev else [data.dev]
    biggest = max((_largest(run.task, split, weigh) for split in splits), key=lambda found: found[0])[1]
    return Workload(
        micro_batches=tuple(tuple(examples[one] for one in part) for part in chosen if part),
        evaluation=biggest,
        steps=steps,
        step_tokens=tokens / seen,
        step_parts=parts_seen / seen,
        evaluation_tokens=_evaluation_tokens(run, data, steps),
        pad_id=data.train.pad_id,
        class_weights=data.class_weights,
        note=f"from the data: the largest of {parts_seen:,} micro-batches of this seed",
    )


def longest_possible(run: Run, head: Head, rows: int | None, processes: int, why: str) -> Workload:
    """An upper bound without data: every text as long as `task.max_length`.

    Args:
        rows: examples of train, if known.
        why: why there are no data.
    """
    training, task = run.training, run.task
    size = -(-training.batch_size // processes)
    example = _longest_example(task, head)
    steps = training.max_steps or (training.total_steps(rows) if rows else 0)
    length = len(example["input_ids"])
    most = (training.micro_batch_size, 1, 0, training.micro_batch_tokens)
    parts = batches.micro_batches(range(size), [length] * size, *most)
    return Workload(
        micro_batches=((example,) * len(parts[0].indices),) * min(2, len(parts)),
        evaluation=(example,) * training.evaluation_batch_size,
        steps=steps if run.method.trains else 0,
        step_tokens=size * length,
        step_parts=len(parts),
        evaluation_tokens=0,
        pad_id=0,
        class_weights=(1.0,) * len(head.labels),
        note=f"an upper bound: every text of {length} tokens (task.max_length), because {why}",
    )


def _largest(task: Task, split: Split, weigh: Weigh) -> tuple[float, tuple[Example, ...]]:
    examples, order = split.encoded.examples, task.order(split.encoded)
    found: tuple[float, tuple[Example, ...]] = (-1.0, ())
    for start in range(0, len(order), split.batch_size):
        batch = tuple(examples[index] for index in order[start : start + split.batch_size])
        weight = weigh(*_shape(batch), sum(map(_supervised, batch)))
        if weight > found[0]:
            found = (weight, batch)
    return found


def _evaluation_tokens(run: Run, data: Prepared, steps: int) -> float:
    """Test before and after training, and dev as often as it is scored."""
    every = run.training.evaluate_every
    interval = run.training.steps_per_epoch(len(data.train.encoded)) if every == "epoch" else every
    times = -(-steps // interval)
    return times * _padded(run.task, data.dev) + (2 if run.method.trains else 1) * _padded(run.task, data.test)


def _padded(task: Task, split: Split) -> int:
    lengths, order = split.encoded.lengths, task.order(split.encoded)
    starts = range(0, len(order), split.batch_size)
    parts = [[lengths[index] for index in order[start : start + split.batch_size]] for start in starts]
    return sum(max(part) * len(part) for part in parts)


def _shape(examples: Sequence[Example]) -> tuple[int, int]:
    return len(examples), max(len(example["input_ids"]) for example in examples)


def _supervised(example: Example) -> int:
    labels = example.get("labels", 0)
    return sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1


def _longest_example(task: Task, head: Head) -> Example:
    """An example of `task.max_length` tokens, all of them supervised."""
    length = task.max_length
    ids = [1] * length
    example: dict[str, Any] = {"input_ids": ids}
    if isinstance(task, SequenceClassification):
        plain = {"single_label": 0, "multi_label": [0] * len(head.labels), "regression": 0.0}
        return example | {"labels": plain[task.problem]}
    if isinstance(task, RelationExtraction):
        return example | {"labels": 0, "markers": [0, 1]}
    if isinstance(task, LabelWords):
        return example | {"labels": 0, "words": tuple((2 + index,) for index in range(max(2, len(head.labels))))}
    if isinstance(task, QuestionAnswering):
        return example | {"labels": [0, 1], "offsets": [(0, 1)] * length}
    if isinstance(task, Seq2Seq):
        return example | {"labels": [1] * task.max_target_length}
    return example | {"labels": ids if isinstance(task, LanguageModel) else [0] * length}
