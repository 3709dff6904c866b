"""A finished run as a model again, and as the backbone of another run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.manifest import read_manifest
from peftkit.artifacts.vetting import vetted
from peftkit.backbones.dropout import NAMES
from peftkit.backbones.load import (
    Backbone,
    BackboneSettings,
    Head,
    load,
    load_tokenizer,
    read_config,
    resolve,
    weight_files,
)
from peftkit.backbones.modules import base_model
from peftkit.backbones.quantize import dequantize
from peftkit.backbones.runs import MANIFEST, MERGED, ORIGIN, is_run, merged_model
from peftkit.config import Run
from peftkit.disk import file_sha256, require_writable, whole_folder, write_text
from peftkit.errors import ArtifactError, NotMergeable
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

PROBE = ("The merged model must compute what the adapted one does.", "So it is asked.")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest accepted |difference| / max(1, largest number), by the dtype that weights are held or multiplied in."""


@dataclass
class SavedRun:
    """A run read back from disk, ready to predict."""

    folder: Path
    run: Run
    manifest: dict[str, Any]
    backbone: Backbone
    model: nn.Module
    head: Head

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        assert self.backbone.tokenizer is not None
        return self.backbone.tokenizer


def load_run(folder: str | Path) -> SavedRun:
    """The trained model of a finished run, on the backbone it was trained on.

    Raises:
        UsageError: `folder` is not a finished run.
        ArtifactError: files changed since they were written, or the backbone's weights are others.
    """
    folder = Path(folder)
    manifest, run = vetted(folder)
    settings = found_again(run.backbone, manifest)
    merge_backbone(run.model_copy(update={"backbone": settings}))
    head = Head.from_dict(manifest["head"])
    backbone = load(settings, head)
    expected = manifest["backbone"]["weights_sha256"]
    if backbone.weights_sha256 != expected:
        files = ", ".join(file.name for file in weight_files(resolve(run.backbone)))
        raise ArtifactError(
            f"{run.backbone.name} ({files}) is not the backbone that {folder} was trained on: its weights hash to "
            f"{backbone.weights_sha256[:12]}…, not {expected[:12]}…; restore those weights or set the same revision"
        )
    model = run.method.load(backbone, folder / manifest["artifact"]).eval()
    return SavedRun(folder, run, manifest, backbone, model, head)


def in_full_precision(saved: SavedRun, precision: str = "float32", original: bool = False) -> nn.Module:
    """The run's model in float32 or float64, where its weights can be merged: where the backbone is quantised, on plain
    layers with the values that training saw, because a merge into quantised ones would round them anew.

    Args:
        original: where the backbone is quantised, on the checkpoint's own weights instead.
    """
    import torch

    wanted: torch.dtype = getattr(torch, precision)
    if saved.run.backbone.quantization is None:
        return saved.model.to(wanted)
    backbone = load(original_settings(saved.run.backbone, saved.manifest, original), saved.head)
    dequantize(backbone.model).to(wanted)
    return saved.run.method.load(backbone, saved.folder / saved.manifest["artifact"]).to(wanted).eval()


def tolerance(settings: BackboneSettings) -> float:
    """Largest accepted |difference| / max(1, largest number) of a merged model, by what its weights are held in and
    what a quantised backbone was multiplied in."""
    computed = settings.quantization.compute_dtype if settings.quantization else "float32"
    return max(TOLERANCE[settings.dtype], TOLERANCE[computed])


def original_settings(settings: BackboneSettings, manifest: dict[str, Any], original: bool) -> BackboneSettings:
    """The backbone where it lies now; if `original`, as it was before it was quantised."""
    found = found_again(settings, manifest)
    return found.model_copy(update={"quantization": None, "dtype": "float32"}) if original else found


def found_again(settings: BackboneSettings, manifest: dict[str, Any]) -> BackboneSettings:
    """A backbone named by a relative folder is looked for where it was when the run was trained."""
    recorded = manifest["backbone"]["folder"]
    if recorded and Path(recorded).is_dir() and not Path(settings.name).expanduser().is_dir():
        return settings.model_copy(update={"name": recorded})
    return settings


def merge_backbone(run: Run) -> None:
    """Where `backbone.name` is a finished run, see to it that its merged model lies in that run's folder.

    It is made once, under a lock, and proven equal. A head that was put on for that run's task is left behind; what it
    added to the tokenizer comes along.

    Raises:
        UsageError: the run is not finished, or its folder cannot be written.
        NotMergeable: its method has no merged form.
        ArtifactError: its files changed, or the merged model computes something else.
    """
    folder = Path(run.backbone.name).expanduser()
    if not is_run(folder):
        return
    manifest = read_manifest(folder)
    if merged_model(folder) is not None:
        return
    from filelock import FileLock

    require_writable(folder / MERGED)
    with FileLock(folder / f".{MERGED}.lock"):
        if merged_model(folder) is None:
            _merge(load_run(folder), manifest)


def _merge(saved: SavedRun, manifest: dict[str, Any]) -> None:
    import torch

    dtype = saved.run.backbone.dtype
    before = _outputs(saved.model.float() if saved.run.backbone.quantization is None else saved.model, saved.tokenizer)
    adapted = in_full_precision(saved)
    try:
        merged: Any = saved.run.method.merge(adapted)
    except NotMergeable as error:
        raise NotMergeable(f"backbone.name: {saved.folder} cannot be built on: {error}") from error
    computed = saved.run.backbone.model_copy(update={"dtype": "float32"})
    _refuse_difference(before, _outputs(merged, saved.tokenizer), tolerance(computed), saved.folder)
    body: Any = base_model(merged) if saved.backbone.head_modules else merged
    expected = _outputs(body, saved.tokenizer)
    _forget_task(body.config, saved.run.backbone)
    record = {
        "folder": str(saved.folder.absolute()),
        "run_id": manifest["run_id"],
        "method": saved.run.method.kind,
        "manifest_sha256": file_sha256(saved.folder / MANIFEST),
    }
    with whole_folder(saved.folder / MERGED) as partial, quiet_libraries():
        body.to(getattr(torch, dtype)).save_pretrained(partial)
        _whole_tokenizer(saved).save_pretrained(partial)
        reread = type(body).from_pretrained(partial, local_files_only=True, dtype=torch.float32).eval()
        _refuse_difference(expected, _outputs(reread, saved.tokenizer), TOLERANCE[dtype], saved.folder)
        write_text(partial / ORIGIN, json.dumps(record, indent=2) + "\n")


def _outputs(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the model makes of the probe: the first of its outputs, without what is padding."""
    import torch

    plain: Any = model
    found = []
    for text in PROBE:
        inputs = {"input_ids": torch.tensor([tokenizer(text)["input_ids"][-16:]])}
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with torch.no_grad():
            found.append(plain.eval()(**inputs)[0].float().flatten())
    return torch.cat(found)


def _refuse_difference(one: Tensor, other: Tensor, tolerance: float, folder: Path) -> None:
    difference = float((one - other).abs().max()) / max(1.0, float(one.abs().max()))
    # written so that a difference that is not a number is refused too
    if not difference <= tolerance:
        raise ArtifactError(
            f"backbone.name: the merged model of {folder} computes something else than the run ({difference:.2g} "
            f"relative, {tolerance:g} allowed); nothing was written"
        )


def _forget_task(config: Any, settings: BackboneSettings) -> None:
    """Leave out of a configuration what was the first task's: labels, kind of problem, dropout."""
    config.problem_type = None
    config.id2label, config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    if settings.dropout is not None:
        original = read_config(resolve(settings))
        for name in NAMES.intersection(vars(original)):
            setattr(config, name, getattr(original, name))


def _whole_tokenizer(saved: SavedRun) -> PreTrainedTokenizerBase:
    """The backbone's own, not one for words that come one by one, with what the run added to it."""
    tokenizer = load_tokenizer(saved.run.backbone)
    if saved.head.new_tokens:
        from peftkit.backbones.new_tokens import add_to_tokenizer

        add_to_tokenizer(tokenizer, saved.head.new_tokens)
    if saved.head.chat_template:
        tokenizer.chat_template = saved.head.chat_template
    return tokenizer
