"""A run that goes on from another one: its adapter and head, trained further on other rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.vetting import vetted
from peftkit.backbones.load import Backbone, Head
from peftkit.config import Run
from peftkit.disk import file_sha256
from peftkit.errors import ArtifactError, MethodError, UsageError
from peftkit.session import MANIFEST

if TYPE_CHECKING:
    from torch import nn

    from peftkit.prepare import Prepared

WHAT_A_HEAD_IS = ("labels", "model_class", "outputs", "problem_type")


def start_from(run: Run, data: Prepared, backbone: Backbone, model: nn.Module) -> None:
    """Give an attached model the weights of the run that `method.start_from` names; nothing where it names none.

    With no step of training, the model then computes what that run's does.

    Raises:
        UsageError: no finished run, or one of another method, other settings or other labels.
        ArtifactError: its files changed, or it was trained on other weights of the backbone.
    """
    if run.method.start_from is None:
        return
    folder = Path(run.method.start_from).expanduser()
    manifest, config = vetted(folder)
    saved = config.method
    if saved.kind != run.method.kind:
        raise UsageError(
            f"method.start_from: {folder} was trained with method '{saved.kind}', and a '{run.method.kind}' cannot "
            f"go on from it; set method.kind: {saved.kind}, or name it as backbone.name to build on its merged model"
        )
    _check_backbone(folder, manifest, backbone)
    if config.backbone.quantization != run.backbone.quantization:
        raise UsageError(
            f"method.start_from: {folder} was trained with backbone.quantization {_settings(config)}, and this run has "
            f"{_settings(run)}, over which the same adapter computes something else; set the same"
        )
    head = Head.from_dict(manifest["head"])
    if not run.method.fresh_head:
        _check_head(folder, head, data.head)
    if head.new_tokens != data.head.new_tokens:
        raise UsageError(f"method.start_from: {folder} added other tokens to the tokenizer than this task does")
    fresh = run.method.fresh_head
    dropped, kept = (tuple(manifest["trained_heads"]), backbone.head_modules) if fresh else ((), ())
    try:
        run.method.refuse_other(saved)
        run.method.restore(model, folder / manifest["artifact"], dropped, kept)
    except MethodError as error:
        raise UsageError(f"method.start_from: {folder}: {error}") from error
    started: Any = model
    started.started_from = {
        "folder": str(folder.absolute()),
        "run_id": manifest["run_id"],
        "manifest_sha256": file_sha256(folder / MANIFEST),
        "head": "fresh" if fresh else "saved",
    }


def _check_backbone(folder: Path, manifest: dict[str, Any], backbone: Backbone) -> None:
    expected = manifest["backbone"]["weights_sha256"]
    if backbone.weights_sha256 != expected:
        raise ArtifactError(
            f"method.start_from: {folder} was trained on other weights than those of {backbone.name} (they hash to "
            f"{expected[:12]}…, not {backbone.weights_sha256[:12]}…); set backbone.name and revision to that run's: "
            f"{manifest['backbone']['name']}"
        )


def _settings(run: Run) -> str:
    quantization = run.backbone.quantization
    return "null" if quantization is None else str(quantization.model_dump(mode="json"))


def _check_head(folder: Path, saved: Head, wanted: Head) -> None:
    for name in WHAT_A_HEAD_IS:
        theirs, ours = getattr(saved, name), getattr(wanted, name)
        if theirs != ours:
            raise UsageError(
                f"method.start_from: the head of {folder} has {name} {_listed(theirs)}, and this task has "
                f"{_listed(ours)}; set task.labels to what they were, or method.fresh_head: true to go on with the "
                "adapter alone"
            )


def _listed(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(map(str, value[:8])) + (", …" if len(value) > 8 else "")
