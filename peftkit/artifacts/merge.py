"""A run as one plain transformers model, proven equal to what was evaluated before it is handed out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.fewer_blocks import check_blocks, drop_blocks
from peftkit.artifacts.fresh_process import Probe, Rereader, reading
from peftkit.artifacts.loading import TOLERANCE, SavedRun, in_full_precision, tolerance
from peftkit.artifacts.plain_reader import is_tied
from peftkit.artifacts.probe import Answers, ask, digests, encoded_probe, examples_sha256
from peftkit.artifacts.proof import (
    Expected,
    MergeReport,
    expected_of,
    figures,
    refuse_far,
    refuse_other,
    relative_difference,
    scores,
)
from peftkit.artifacts.requantize import TOLERANCE as PACKED
from peftkit.artifacts.requantize import check_rows, save_packed
from peftkit.artifacts.rounding import round_model
from peftkit.artifacts.settings import BESIDE, BYTES, MergeSettings
from peftkit.artifacts.target import check_new_folder
from peftkit.backbones.load import save_tokenizer
from peftkit.backbones.quantize import check_backend, quantize
from peftkit.config import Run
from peftkit.data.files import Rows
from peftkit.disk import file_sha256, require_space, whole_folder, write_text
from peftkit.environment import versions
from peftkit.errors import ArtifactError
from peftkit.prepare import Split
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import nn

REPORT = "peftkit_merge.json"


def merge(
    saved: SavedRun,
    target: str | Path,
    probe: Rows,
    settings: MergeSettings | None = None,
    reader: Rereader | None = None,
) -> MergeReport:
    """Compute W + ΔW, save it, let another process read it back, compare on `probe`; nothing is left at `target` unless
    it is equal.

    Consumes `saved.model`.

    Args:
        reader: a process that reads it back; default: one that is started for it.

    Raises:
        UsageError: `target` exists, or lies inside the run; settings that are for quantised runs alone.
        NotMergeable: the method has no merged form.
        ArtifactError: the merged model computes something else, is not whole, or there is no room for it.
    """
    target, settings = Path(target), settings or MergeSettings()
    check_new_folder(target, [saved.folder], "a merge")
    settings.check(saved.run.backbone)
    if settings.pack:
        check_backend("cpu", "--quantize")
    saved.model.cpu()  # a prediction may have moved it
    if settings.drop_layers:
        check_blocks(saved.backbone.model, saved.backbone.layout, settings.drop_layers)
    split, scored = encoded_probe(saved.run, probe, saved.head, saved.tokenizer)
    before = ask(saved.model, saved.run, split, scored)
    with whole_folder(target) as partial, reading(reader) as process:
        merged, arithmetic = merged_model(saved, split, settings)
        if packing := settings.packing(saved.run.backbone):
            check_rows(merged, saved.backbone.layout, packing)
        whole_bytes = bytes_in(merged, settings.dtype_for(saved.run.backbone))
        if settings.drop_layers:
            drop_blocks(merged, saved.backbone.layout, settings.drop_layers)
        require_room(target, merged, settings.dtype_for(saved.run.backbone))
        reference = _reference(merged, saved, split, settings, before)
        expected = write_merged(merged, saved, partial, settings)
        del merged
        report = _read_back(saved, partial, probe, settings, process, split, before, reference, expected)
        report = replace(report, arithmetic=arithmetic, bytes=written_bytes(partial), whole_bytes=whole_bytes)
        write_report(partial, report, saved.manifest)
    return report


def compared(saved: SavedRun, folder: Path, probe: Rows, settings: MergeSettings, process: Rereader) -> MergeReport:
    """How far a merged model in a folder is from the run.

    Raises:
        ArtifactError: farther than is let through.
    """
    split, scored = encoded_probe(saved.run, probe, saved.head, saved.tokenizer)
    before = ask(saved.model, saved.run, split, scored)
    return _read_back(saved, folder, probe, settings, process, split, before)


def _read_back(
    saved: SavedRun,
    folder: Path,
    probe: Rows,
    settings: MergeSettings,
    process: Rereader,
    split: Split,
    before: Answers,
    reference: Answers | None = None,
    expected: Expected | None = None,
) -> MergeReport:
    dtype = settings.dtype_for(saved.run.backbone)
    asked = Probe(saved.folder, saved.head, probe, len(before.logits))
    found, after = process.describe(folder, saved.head.model_class, dtype, probe=asked)
    if expected is not None:
        refuse_other(expected, found)
    if found["examples"] != examples_sha256(split):
        raise ArtifactError("the merged model's tokenizer makes other tokens of the rows; nothing was written")
    if reference is not None:
        _refuse_far_from(reference, after, saved, settings)
    report = MergeReport(
        **figures(saved.run.task, before.logits, after),
        examples=len(split.encoded),
        tolerance=allowed(saved, settings),
        model_class=saved.head.model_class,
        pooling=getattr(saved.run.task, "pooling", "none"),
        score=scores(before, found["score"]),
        settings=told(saved.run, settings) | {"probe": probe.source},
    )
    if settings.is_whole:
        refuse_far(report.relative, report.largest_difference, report.tolerance)
    return report


def allowed(saved: SavedRun, settings: MergeSettings) -> float:
    """Largest accepted |Δlogit| / max(1, |logit|), by the dtypes that either model is held or multiplied in."""
    return max(TOLERANCE[settings.dtype_for(saved.run.backbone)], tolerance(saved.run.backbone))


def merged_model(saved: SavedRun, split: Split, settings: MergeSettings) -> tuple[nn.Module, float]:
    """The merged model in full precision, and how far it is from the same weights unmerged on the first batch.

    Raises:
        NotMergeable: the method has no merged form.
        ArtifactError: it computes something else than before it was merged.
    """
    adapted = in_full_precision(saved, settings.precision, original=settings.onto == "full-precision")
    before = ask(adapted, saved.run, split, scored=False, examples=split.batch_size)
    merged = saved.run.method.merge(adapted)
    after = ask(merged, saved.run, split, scored=False, examples=split.batch_size)
    found = relative_difference(before.logits, after.logits)
    refuse_far(found, found, TOLERANCE["float32"], "the merge itself")
    return merged, found


def require_room(target: Path, model: nn.Module, dtype: str) -> None:
    """Refuse to write what the disk would not hold.

    Raises:
        ArtifactError: says how much is missing where.
    """
    needed = bytes_in(model, dtype) + BESIDE
    require_space(target, needed, "the merged model needs", "name a folder on another disk")


def bytes_in(model: nn.Module, dtype: str) -> int:
    """What the weights of a model take in a dtype."""
    return BYTES[dtype] * sum(parameter.numel() for parameter in model.parameters())


def written_bytes(folder: Path) -> int:
    """What the weight files in a folder take."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def write_merged(merged: Any, saved: SavedRun, folder: Path, settings: MergeSettings) -> Expected:
    """Cast once, save with everything that belongs to it; returns what must be found when it is read back."""
    import torch

    dtype = settings.dtype_for(saved.run.backbone)
    packing = settings.packing(saved.run.backbone)
    weights = {} if packing else digests(merged, getattr(torch, dtype))
    expected = expected_of(merged, saved.tokenizer, saved.head, dtype, is_tied(merged), weights)
    with quiet_libraries():
        cast: Any = round_model(merged, getattr(torch, dtype))
        if packing:
            packed = save_packed(cast, saved.head.model_class, packing, folder, settings.shard_bytes)
            expected = replace(expected, tensors=packed)
        else:
            cast.save_pretrained(folder, max_shard_size=settings.shard_bytes)
        save_tokenizer(saved.tokenizer, folder)
    return expected


def write_report(folder: Path, report: MergeReport, manifest: dict[str, Any], leave_out: str = "") -> None:
    """Put the figures beside the model, with the hash of each of its files."""
    files = [file for file in sorted(folder.iterdir()) if file.name != leave_out]
    record = report.as_dict() | {
        "run_id": manifest["run_id"],
        "files": {file.name: file_sha256(file) for file in files},
        "versions": versions(),
    }
    write_text(folder / REPORT, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _reference(merged: Any, saved: SavedRun, split: Split, settings: MergeSettings, before: Answers) -> Answers | None:
    """What a model that is read back, and is not the one that was trained, must compute: what the merged model does
    while it is still in memory. None where the run itself is what it is compared with."""
    if settings.is_whole:
        return None
    import copy

    import torch

    model, packing = merged, settings.packing(saved.run.backbone)
    if packing:
        model = round_model(copy.deepcopy(merged), getattr(torch, settings.dtype_for(saved.run.backbone)))
        quantize(model, saved.backbone.layout, packing)
        model.cpu()  # a GPU may have packed it
    return ask(model, saved.run, split, scored=False, examples=len(before.logits))


def _refuse_far_from(reference: Answers, after: list[Any], saved: SavedRun, settings: MergeSettings) -> None:
    far = relative_difference(reference.logits[: len(after)], after)
    limit, packing = allowed(saved, settings), settings.packing(saved.run.backbone)
    if packing:
        limit = max(limit, PACKED[packing.kind])
    refuse_far(far, far, limit, "what was read back")


def told(run: Run, settings: MergeSettings) -> dict[str, Any]:
    """What was asked for, and of what."""
    quantization, packing = run.backbone.quantization, settings.packing(run.backbone)
    return asdict(settings) | {
        "packing": packing and str(packing),
        "limited": settings.is_whole,
        "dtype": settings.dtype_for(run.backbone),
        "method": run.method.kind,
        "quantization": quantization and str(quantization),
    }
