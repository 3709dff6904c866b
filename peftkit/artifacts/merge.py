"""A run as one plain transformers model, proven equal to what was evaluated before it is handed out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.store import SavedRun
from peftkit.data.collate import collate
from peftkit.data.files import Rows
from peftkit.disk import require_writable, whole_folder, write_text
from peftkit.errors import ArtifactError, UsageError
from peftkit.prepare import Split, encode_split
from peftkit.quiet import quiet_libraries
from peftkit.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

REPORT = "peftkit_merge.json"
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest accepted |Δlogit| / max(1, max |logit|), by the dtype the backbone is held in."""


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model, read back from disk, is from the adapter it came from."""

    rows: int
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
    split = encode_split(saved.run, probe.source, probe, saved.head, saved.tokenizer, supervised=False)
    before = _all_logits(saved.model, saved.run.task, split)
    with whole_folder(target) as partial:
        _write(saved, partial, dtype)
        after = _all_logits(_read(saved, partial), saved.run.task, split)
        report = _compare(before, after, TOLERANCE[dtype], saved)
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

    merged: Any = saved.run.method.merge(saved.model.float())
    with quiet_libraries():
        merged.to(getattr(torch, dtype)).save_pretrained(folder)
        saved.tokenizer.save_pretrained(folder)


def _read(saved: SavedRun, folder: Path) -> nn.Module:
    import transformers

    with quiet_libraries():
        model: nn.Module = getattr(transformers, saved.head.model_class).from_pretrained(folder, local_files_only=True)
    return model.eval()


def _all_logits(model: nn.Module, task: Task, split: Split) -> list[Tensor]:
    """Logits of real tokens, example by example, in batches of similar length."""
    import torch

    lengths, examples = split.encoded.lengths, split.encoded.examples
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    found: dict[int, Tensor] = {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), split.batch_size):
            indices = order[start : start + split.batch_size]
            logits = task.logits(model, collate([examples[index] for index in indices], split.pad_id)).float()
            for row, index in enumerate(indices):
                found[index] = logits[row] if logits.ndim == 2 else logits[row, : lengths[index]]
    return [found[index] for index in range(len(examples))]


def _compare(before: list[Tensor], after: list[Tensor], tolerance: float, saved: SavedRun) -> MergeReport:
    pairs = list(zip(before, after, strict=True))
    report = MergeReport(
        rows=len(pairs),
        equal_predictions=sum(bool((one.argmax(-1) == two.argmax(-1)).all()) for one, two in pairs),
        largest_difference=max(float((one - two).abs().max()) for one, two in pairs),
        largest_logit=max(float(one.abs().max()) for one in before),
        tolerance=tolerance,
        model_class=saved.head.model_class,
        pooling=getattr(saved.run.task, "pooling", "none"),
    )
    # written so that a difference that is not a number is refused too
    if not report.relative <= tolerance:
        raise ArtifactError(
            f"the merged model is not the one that was evaluated: logits differ by {report.largest_difference:.2g} "
            f"({report.relative:.2g} relative, {tolerance:g} allowed); nothing was written"
        )
    return report
