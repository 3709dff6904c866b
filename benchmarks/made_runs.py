"""Run folders without a training: everything that a finished run holds, with random numbers in the place of what would
have been learnt. Merges and their proof ask for no more."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from peftkit.artifacts.hollow import hollow
from peftkit.backbones.load import Backbone, Head, load, resolve, weight_files, weights_sha256
from peftkit.config import Run, run_id
from peftkit.config_file import to_yaml
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.methods.base import trained_parameters

STEPS = 12
"""Of the schedule that a method is told."""


def make_run(run: Run, head: Head, folder: Path, spread: float = 0.05, without_weights: bool = False) -> Path:
    """Write a run folder.

    Args:
        spread: standard deviation of what is added to each number that trains.
        without_weights: of a backbone too large to be loaded; for methods that do not change it.
    """
    import torch

    torch.manual_seed(0)
    backbone = hollow(run.backbone, head).backbone if without_weights else load(run.backbone, head)
    model = run.method.attach(backbone, total_steps=STEPS)
    change(model, run.method, spread)
    artifact = folder / run.method.artifact
    artifact.mkdir(parents=True)
    run.method.save(model, artifact)
    (folder / "run.yaml").write_text(f"# run {run_id(run)}\n{to_yaml(run.model_dump(mode='json'))}", encoding="utf-8")
    write_manifest(run, head, backbone, folder)
    return folder


def change(model: Any, method: Any, spread: float) -> None:
    """Move what trains by random numbers; a method with a schedule is led to its end."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (spread * noise).to(parameter)
    if method.kind != "adalora":
        return
    for step in range(1, STEPS + 1):
        for parameter in trained_parameters(model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        method.after_step(model, step)


def write_manifest(run: Run, head: Head, backbone: Backbone, folder: Path) -> None:
    """Write the manifest of what lies in the folder."""
    artifact = folder / run.method.artifact
    files = [folder / "run.yaml", *sorted(file for file in artifact.rglob("*") if file.is_file())]
    origin = {"name": run.backbone.name, "revision": None, "run": None, "folder": run.backbone.name}
    manifest = {
        "format": 1,
        "run_id": run_id(run),
        "backbone": origin | {"weights_sha256": weights_sha256(weight_files(resolve(run.backbone)))},
        "head": dataclasses.asdict(head),
        "trained_heads": list(backbone.head_modules),
        "artifact": run.method.artifact,
        "files": {file.relative_to(folder).as_posix(): file_sha256(file) for file in files},
    }
    whole = manifest | {"sha256": manifest_sha256(json.loads(json.dumps(manifest)))}
    (folder / "manifest.json").write_text(json.dumps(whole), encoding="utf-8")
