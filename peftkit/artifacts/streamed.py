"""A streamed merge and its proof: each layer read back beside the same layer unmerged, and the whole model where it
fits into memory."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.checkpoints import PIECE, Checkpoint, bytes_of
from peftkit.artifacts.fresh_process import Rereader, fresh_process
from peftkit.artifacts.loading import SavedRun, merge_backbone, original_settings
from peftkit.artifacts.merge import compared, told, write_report, written_bytes
from peftkit.artifacts.proof import Expected, MergeReport, expected_of, refuse_far, refuse_other
from peftkit.artifacts.rounding import rounded
from peftkit.artifacts.settings import BYTES, MergeSettings
from peftkit.artifacts.streaming import PROGRESS, Stream, finish, opened, working_folder, write
from peftkit.artifacts.target import check_new_folder
from peftkit.artifacts.vetting import vetted
from peftkit.backbones.load import resolve, weight_files
from peftkit.data.files import Rows
from peftkit.errors import ArtifactError, PeftkitError
from peftkit.memory import available_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest accepted |difference| / max(1, largest output) of one layer, by the dtype that its weights are saved in."""
ROWS = 4
"""Random inputs that each layer is compared on."""


def needs_streaming(folder: Path, settings: MergeSettings) -> bool:
    """Whether a merge in memory, and its proof, would take more than there is."""
    return bytes_in_memory(folder, settings) > available_bytes()


def bytes_in_memory(folder: Path, settings: MergeSettings) -> int:
    """What a merge in memory holds at once: the model as it was evaluated, in full precision, and read back."""
    manifest, run = vetted(folder)
    backbone = original_settings(run.backbone, manifest, original=False)
    merge_backbone(run.model_copy(update={"backbone": backbone}))
    held = Checkpoint(weight_files(resolve(backbone))).entries.values()
    numbers = sum(math.prod(entry.shape) for entry in held)
    full = 8 if settings.precision == "float64" else 4
    return numbers * (BYTES[backbone.dtype] + 2 * full + BYTES[settings.dtype_for(backbone)])


def merge_streamed(
    folder: Path, target: Path, settings: MergeSettings, probe: Rows | None = None, saved: SavedRun | None = None
) -> MergeReport:
    """Merge tensor by tensor; nothing is left at `target` unless what was written is right.

    A merge that is stopped leaves the files that it finished in a hidden folder beside `target`; the same call goes on
    with them.

    Args:
        probe, saved: the run in memory, and rows to compare the whole model on too, where it fits.

    Raises:
        UsageError, NotMergeable, ArtifactError: as for `peftkit.artifacts.merge.merge`.
    """
    check_new_folder(target, [folder], "a merge")
    stream = opened(folder, settings)
    try:
        working = write(stream, target, settings)
        with fresh_process() as reader:
            report = _proven(stream, working, settings, reader)
            if probe is not None and saved is not None:
                whole = compared(saved, working, probe, settings, reader)
                report = replace(whole, **_of(report), settings=report.settings | {"probe": probe.source})
    except PeftkitError:
        shutil.rmtree(working_folder(target), ignore_errors=True)
        raise
    size = written_bytes(working)
    report = replace(report, bytes=size, whole_bytes=size)
    write_report(working, report, stream.manifest, leave_out=PROGRESS)
    finish(working, target)
    return report


def _of(report: MergeReport) -> dict[str, Any]:
    """What of a report is about the layers."""
    return {"layers": report.layers, "layer_difference": report.layer_difference}


def _proven(stream: Stream, working: Path, settings: MergeSettings, reader: Rereader) -> MergeReport:
    found, _ = reader.describe(working, stream.head.model_class, stream.dtype, weights=False)
    refuse_other(_expected(stream), {**found, "files": [one for one in found["files"] if one != PROGRESS]}, False)
    layers, difference = check_layers(stream, working)
    return MergeReport(
        rows=0,
        equal_predictions=0,
        argmax_agreement=None,
        largest_difference=0.0,
        largest_logit=0.0,
        mean_divergence=0.0,
        largest_divergence=0.0,
        tolerance=TOLERANCE[stream.dtype],
        model_class=stream.head.model_class,
        pooling=getattr(stream.run.task, "pooling", "none"),
        layers=layers,
        layer_difference=difference,
        settings=told(stream.run, settings) | {"streamed": True, "layer_tolerance": TOLERANCE[stream.dtype]},
    )


def _expected(stream: Stream) -> Expected:
    model = stream.source.backbone.model
    return expected_of(model, stream.tokenizer, stream.head, stream.dtype, tied=False, tensors={})


def check_layers(stream: Stream, written: Path) -> tuple[int, float]:
    """Read every tensor back. An adapted layer must compute what it does with ΔW apart from W; every other tensor must
    be the backbone's or the run's, cast once.

    Returns:
        How many layers were adapted, and their largest difference, relative to the largest output of the layer.

    Raises:
        ArtifactError: names the tensor or the layer that differs, or what is missing.
    """
    import torch

    files = Checkpoint(sorted(written.glob("model*.safetensors")))
    if odd := sorted(files.entries.keys() ^ stream.source.saved.keys()):
        raise ArtifactError(f"the merged model is not whole: its files differ in '{odd[0]}'; nothing was written")
    names = {own: name for name, own in stream.source.saved.items()}
    adapted, worst = stream.layers.adapted(), 0.0
    with torch.no_grad():
        for name, layer in adapted.items():
            found = _difference(stream, files, names, name, layer)
            refuse_far(found, found, TOLERANCE[stream.dtype], f"layer '{name}' of the merged model")
            worst = max(worst, found)
        for own, name in names.items():
            if own.rpartition(".")[0] not in adapted:
                _refuse_changed(stream, files, own, name)
    return len(adapted), worst


def _difference(stream: Stream, files: Checkpoint, names: dict[str, str], name: str, layer: Any) -> float:
    """Largest difference of a layer's outputs before and after, over the largest output."""
    with stream.layers.filled(name, layer):
        base = layer.get_base_layer()
        inputs = _inputs(base, stream.layers.wanted)
        before = layer(inputs)
        for attribute, parameter in base.named_parameters(recurse=False):
            own = f"{name}.{attribute}"
            if own in names:
                parameter.data = files.read(names[own]).to(parameter.dtype)
        after = base(inputs)
    return float((before - after).abs().max()) / max(1.0, float(before.abs().max()))


def _inputs(base: nn.Module, kind: Any) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    plain: Any = base
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(plain.num_embeddings, (ROWS, ROWS), generator=generator)
    width = plain.in_features if hasattr(plain, "in_features") else plain.nx
    return torch.randn(ROWS, width, generator=generator).to(kind)


def _refuse_changed(stream: Stream, files: Checkpoint, own: str, name: str) -> None:
    import torch

    cast = getattr(torch, stream.dtype)
    pieces = stream.layers.parts(own)
    expected = (rounded(piece, cast) for piece in pieces)
    # a tensor of the run comes in one piece
    numbers = (part for one in expected for part in one.reshape(-1).split(PIECE))
    for wanted, found in zip(numbers, files.parts(name), strict=True):
        if wanted.dtype != found.dtype or bytes_of(wanted.contiguous()) != bytes_of(found):
            raise ArtifactError(
                f"the merged model is not the one that was evaluated: '{name}' differs; nothing was written"
            )
