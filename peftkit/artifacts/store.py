"""A finished run on disk: written once, read back and checked."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import SavedRun, load_run
from peftkit.artifacts.manifest import FORMAT, read_manifest
from peftkit.backbones.load import Backbone, resolve
from peftkit.backbones.runs import origin
from peftkit.config import Run, run_id
from peftkit.disk import file_sha256, manifest_sha256, whole_folder, write_text
from peftkit.environment import hardware, versions
from peftkit.errors import ArtifactError
from peftkit.evaluation import Evaluation
from peftkit.methods.base import trained_parameters
from peftkit.quiet import quiet_libraries
from peftkit.session import MANIFEST, RUN_FILE, release, run_folder
from peftkit.training.loop import CHECKPOINTS
from peftkit.training.record import TrainRecord
from peftkit.training.watch import pace_of
from peftkit.training.whole import whole_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from peftkit.prepare import Prepared

__all__ = ["SavedRun", "file_hashes", "load_run", "read_manifest", "save", "saved_parameters"]

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


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
    with whole_parameters(model, accelerator.is_main_process):
        if accelerator.is_main_process:
            _save_artifact(run, model, folder / run.method.artifact)
    if accelerator.is_main_process:
        _write_predictions(run, data, evaluations["after"], folder / PREDICTIONS)
        scores = {name: dataclasses.asdict(one.scores) for name, one in evaluations.items()}
        _write_json(folder / SCORES, scores)
        manifest = _manifest(run, data, backbone, record, evaluations)
        manifest["started_from"] = getattr(model, "started_from", None)
        manifest["saved_parameters"] = saved_parameters(folder / run.method.artifact)
        manifest["files"] = file_hashes(folder, folder / run.method.artifact)
        _write_json(folder / MANIFEST, manifest | {"sha256": manifest_sha256(manifest)})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        release(run, accelerator)
    pace_of(accelerator).arrive()
    accelerator.wait_for_everyone()
    if run.output.trackers:
        accelerator.end_training()
    return folder


def saved_parameters(artifact: Path) -> int:
    """The numbers in the weight files of a saved artifact, head included."""
    from safetensors import safe_open

    total = 0
    for file in artifact.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


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
            "run": origin(resolve(run.backbone)),
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
        "hardware": hardware(),
        "versions": versions(),
    }


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def file_hashes(folder: Path, artifact: Path) -> dict[str, str]:
    """The hash of everything that decides what the saved model computes."""
    files = [folder / RUN_FILE, *sorted(file for file in artifact.rglob("*") if file.is_file())]
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _save_artifact(run: Run, model: nn.Module, artifact: Path) -> None:
    if run.method.trains and not trained_parameters(model):
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
