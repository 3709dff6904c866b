"""A run as one plain transformers model, proven equal to what was evaluated before it is handed out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import in_full_precision, tolerance
from peftkit.artifacts.store import SavedRun
from peftkit.data.collate import IGNORED, collate
from peftkit.data.files import Rows
from peftkit.disk import require_writable, whole_folder, write_text
from peftkit.errors import ArtifactError, UsageError
from peftkit.prepare import Split, encode_split
from peftkit.quiet import quiet_libraries
from peftkit.tasks.base import Example, Task
from peftkit.tasks.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor, nn

REPORT = "peftkit_merge.json"
LAST_TOKENS = 16
"""Supervised tokens of each row that language models are compared on."""
MOST_LOGITS = 2**26
"""Numbers that are held to compare; 256 MiB."""


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model, read back from disk, is from the adapter it came from."""

    rows: int
    """Compared: the first ones, as many as keep the logits that are held at once in bounds."""
    examples: int
    """Given to compare on; windows count one by one."""
    equal_predictions: int
    largest_difference: float
    """Largest |Δlogit|."""
    largest_logit: float
    tolerance: float
    model_class: str
    pooling: str

    @property
    def relative(self) -> float:
        """Largest |Δlogit| over max(1, largest |logit|)."""
        return self.largest_difference / max(1.0, self.largest_logit)


def merge(saved: SavedRun, target: str | Path, probe: Rows) -> MergeReport:
    """Merge in float32, save, read back, compare on `probe`; nothing is left at `target` unless it is equal.

    Consumes `saved.model`.

    Raises:
        UsageError: `target` exists, or lies inside the run.
        NotMergeable: the method has no merged form.
        ArtifactError: the merged model computes something else.
    """
    target = Path(target)
    check_target(saved.folder, target)
    saved.model.cpu()  # a prediction may have moved it
    dtype = saved.run.backbone.dtype
    task = saved.run.task
    # a language model is compared where it is scored
    supervised = isinstance(task, LanguageModel)
    split = encode_split(saved.run, probe.source, probe, saved.head, saved.tokenizer, supervised)
    before = _remembered(saved.model, task, split)
    with whole_folder(target) as partial:
        _write(saved, partial, dtype)
        report = _compare(before, _logits(_read(saved, partial), task, split), split, saved)
        record = vars(report) | {"run_id": saved.manifest["run_id"]}
        write_text(partial / REPORT, json.dumps(record, indent=2) + "\n")
    return report


def check_target(run_folder: Path, target: Path) -> None:
    """Refuse a target that exists or that lies inside the run."""
    if target.exists():
        raise UsageError(f"{target} exists; name a new folder for the merged model")
    if run_folder.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies inside the run {run_folder}; name a folder outside it")
    require_writable(target)


def _write(saved: SavedRun, folder: Path, dtype: str) -> None:
    import torch

    merged: Any = saved.run.method.merge(in_full_precision(saved))
    with quiet_libraries():
        merged.to(getattr(torch, dtype)).save_pretrained(folder)
        saved.tokenizer.save_pretrained(folder)


def _read(saved: SavedRun, folder: Path) -> nn.Module:
    import transformers

    with quiet_libraries():
        model: nn.Module = getattr(transformers, saved.head.model_class).from_pretrained(folder, local_files_only=True)
    return model.eval()


def _batches(split: Split) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(examples, batch) in the order of the split."""
    examples = split.encoded.examples
    for start in range(0, len(examples), split.batch_size):
        indices = list(range(start, min(start + split.batch_size, len(examples))))
        yield indices, collate([_ending(examples[index]) for index in indices], split.pad_id)


def _ending(example: Example) -> Example:
    """Of a language model's example, only the last supervised tokens; all that stands before decides those too."""
    labels = example.get("labels")
    if not isinstance(labels, list):
        return example
    kept = [position for position, label in enumerate(labels) if label != IGNORED][-LAST_TOKENS:]
    return example | {"labels": [label if position in kept else IGNORED for position, label in enumerate(labels)]}


def _logits(model: nn.Module, task: Task, split: Split) -> Iterator[list[Tensor]]:
    """Batch by batch, the logits of each example's real tokens; of language models, of its last supervised ones."""
    import torch

    model.eval()
    for indices, batch in _batches(split):
        with torch.no_grad():
            if isinstance(task, LanguageModel):
                yield [logits.float() for logits in task.split_logits(model, batch)]
                continue
            logits = task.logits(model, batch).float()
        lengths = [split.encoded.lengths[index] for index in indices]
        yield [row if logits.ndim == 2 else row[:length] for row, length in zip(logits, lengths, strict=True)]


def _remembered(model: nn.Module, task: Task, split: Split) -> list[list[Tensor]]:
    """The logits of the first batches, as many as may be held at once; of the first in any case."""
    kept: list[list[Tensor]] = []
    held = 0
    for rows in _logits(model, task, split):
        kept.append(rows)
        held += sum(row.numel() for row in rows)
        if held >= MOST_LOGITS:
            break
    return kept


def _compare(before: list[list[Tensor]], after: Iterator[list[Tensor]], split: Split, saved: SavedRun) -> MergeReport:
    alike, differences, largest, equal, rows = saved.run.task.answers_alike, [0.0], [0.0], 0, 0
    for old, new in zip(before, after, strict=False):
        pairs = [(one, two) for one, two in zip(old, new, strict=True) if one.numel()]
        differences += [_most(one - two) for one, two in pairs]
        largest += [_most(one) for one, _ in pairs]
        equal += sum(alike(one, two) for one, two in pairs)
        rows += len(pairs)
    report = MergeReport(
        rows=rows,
        examples=len(split.encoded),
        equal_predictions=equal,
        largest_difference=math.nan if any(map(math.isnan, differences)) else max(differences),
        largest_logit=max(largest),
        tolerance=tolerance(saved.run.backbone),
        model_class=saved.head.model_class,
        pooling=getattr(saved.run.task, "pooling", "none"),
    )
    if not rows:
        raise ArtifactError("nothing to compare the merged model on: no row has a supervised token; give others")
    # written so that a difference that is not a number is refused too
    if not report.relative <= report.tolerance:
        raise ArtifactError(
            f"the merged model is not the one that was evaluated: logits differ by {report.largest_difference:.2g} "
            f"({report.relative:.2g} relative, {report.tolerance:g} allowed); nothing was written"
        )
    return report


def _most(values: Tensor) -> float:
    return float(values.abs().max())
