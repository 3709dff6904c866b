"""A finished run on disk: written once, read back and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import Backbone, BackboneSettings, Head, load, resolve, weight_files
from peftkit.config import Run, run_id
from peftkit.config import load_run as load_config
from peftkit.disk import file_sha256, whole_folder, write_text
from peftkit.environment import versions
from peftkit.errors import ArtifactError, ConfigError, UsageError
from peftkit.evaluation import Evaluation
from peftkit.methods.base import trained_parameters
from peftkit.quiet import quiet_libraries
from peftkit.session import MANIFEST, RUN_FILE, release, run_folder
from peftkit.training.loop import CHECKPOINTS, TrainRecord

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peftkit.prepare import Prepared

FORMAT = 1
PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


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


def save(
    run: Run,
    data: Prepared,
    backbone: Backbone,
    model: nn.Module,
    record: TrainRecord,
    evaluations: dict[str, Evaluation],
    accelerator: Accelerator,
) -> Path:
    """Write the run folder; the manifest comes last, so that its presence means the run is whole.

    Args:
        evaluations: by name: `majority`, `before`, `after`; the predictions of `after` are kept.

    Returns:
        The run folder.
    """
    folder = run_folder(run)
    if accelerator.is_main_process:
        _save_artifact(run, model, folder / run.method.artifact)
        _write_predictions(run, data, evaluations["after"], folder / PREDICTIONS)
        scores = {name: dataclasses.asdict(one.scores) for name, one in evaluations.items()}
        _write_json(folder / SCORES, scores)
        manifest = _manifest(run, data, backbone, record, evaluations)
        manifest["saved_parameters"] = saved_parameters(folder / run.method.artifact)
        manifest["files"] = _hashes(folder, folder / run.method.artifact)
        _write_json(folder / MANIFEST, manifest | {"sha256": _manifest_sha256(manifest)})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        release(run, accelerator)
    accelerator.wait_for_everyone()
    if run.output.trackers:
        accelerator.end_training()
    return folder


def load_run(folder: str | Path) -> SavedRun:
    """The trained model of a finished run, on the backbone it was trained on.

    Raises:
        UsageError: `folder` is not a finished run.
        ArtifactError: files changed since they were written, or the backbone's weights are others.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    run = read_saved_config(folder)
    head = Head.from_dict(manifest["head"])
    backbone = load(_found_again(run.backbone, manifest), head)
    expected = manifest["backbone"]["weights_sha256"]
    if backbone.weights_sha256 != expected:
        files = ", ".join(file.name for file in weight_files(resolve(run.backbone)))
        raise ArtifactError(
            f"{run.backbone.name} ({files}) is not the backbone that {folder} was trained on: its weights hash to "
            f"{backbone.weights_sha256[:12]}…, not {expected[:12]}…; restore those weights or set the same revision"
        )
    model = run.method.load(backbone, folder / manifest["artifact"]).eval()
    return SavedRun(folder, run, manifest, backbone, model, head)


def _found_again(settings: BackboneSettings, manifest: dict[str, Any]) -> BackboneSettings:
    """A backbone named by a relative folder is looked for where it was when the run was trained."""
    recorded = manifest["backbone"]["folder"]
    if recorded and Path(recorded).is_dir() and not Path(settings.name).expanduser().is_dir():
        return settings.model_copy(update={"name": recorded})
    return settings


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        UsageError: `folder` is not a finished run.
        ArtifactError: the manifest was changed, or is of another format.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise UsageError(f"no run folder {folder}")
    if not file.is_file():
        state = "is not finished: run its command again" if (folder / RUN_FILE).is_file() else "is not a run folder"
        raise UsageError(f"{folder} {state} (it has no {MANIFEST})")
    try:
        manifest: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {error}; restore it, or train again") from error
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file} has format {manifest.get('format')}; this peftkit reads format {FORMAT}")
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise ArtifactError(f"{file} changed after it was written; restore it, or train again")
    return manifest


def saved_parameters(artifact: Path) -> int:
    """The numbers in the weight files of a saved artifact, head included."""
    from safetensors import safe_open

    total = 0
    for file in artifact.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def read_saved_config(folder: Path) -> Run:
    """The resolved configuration of a run."""
    try:
        return load_config(folder / RUN_FILE)
    except ConfigError as error:
        raise ArtifactError(f"{folder / RUN_FILE} does not fit this version of peftkit: {error}") from error


def _manifest(
    run: Run, data: Prepared, backbone: Backbone, record: TrainRecord, evaluations: dict[str, Evaluation]
) -> dict[str, Any]:
    costs = dataclasses.asdict(record)
    return {
        "format": FORMAT,
        "run_id": run_id(run),
        "backbone": {
            "name": backbone.name,
            "revision": backbone.revision,
            "weights_sha256": backbone.weights_sha256,
            "folder": str(Path(backbone.name).expanduser().absolute()) if _is_folder(backbone.name) else None,
        },
        "task": run.task.kind,
        "head": dataclasses.asdict(data.head),
        "trained_heads": list(backbone.head_modules),
        "method": run.method.model_dump(mode="json"),
        "artifact": run.method.artifact,
        "data": data.fingerprint,
        "evaluated_on": evaluations["after"].split.name,
        "scores": {name: one.scores.values for name, one in evaluations.items()},
        "training": {name: value for name, value in costs.items() if name not in ("losses", "evaluations")},
        "notes": list(data.notes),
        "versions": versions(),
    }


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path, artifact: Path) -> dict[str, str]:
    """The hash of everything that decides what the saved model computes."""
    files = [folder / RUN_FILE, *sorted(file for file in artifact.rglob("*") if file.is_file())]
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _save_artifact(run: Run, model: nn.Module, artifact: Path) -> None:
    if not trained_parameters(model):
        raise ArtifactError("nothing was trained; there is nothing to save")
    with whole_folder(artifact) as partial, quiet_libraries():
        run.method.save(model, partial)


def _write_predictions(run: Run, data: Prepared, evaluation: Evaluation, file: Path) -> None:
    rows = evaluation.split.rows
    references = run.task.references(rows, data.head.labels)
    lines = []
    for index, (prediction, reference) in enumerate(zip(evaluation.predictions, references, strict=True)):
        line = {"index": index, "place": rows.where(index), "reference": reference, "prediction": prediction}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; the run is not whole: restore it, or train again")
        if file_sha256(file) != expected:
            raise ArtifactError(
                f"{file} changed after it was written (its sha256 differs from {MANIFEST}'s); "
                "restore it, or train again"
            )
