"""Finished runs as backbones: where the merged model of one lies, and whether it is still that run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.disk import file_sha256
from peftkit.errors import UsageError
from peftkit.tensor_files import parse_object

MANIFEST = "manifest.json"
RUN_FILE = "run.yaml"
MERGED = "merged"
"""The sub-folder of a run that holds its merged model, once a run was built on it."""
BUNDLED = "backbone"
"""The sub-folder of a bundle that holds the backbone of its run."""
ORIGIN = "peftkit_run.json"
"""In that folder: which run it was made from."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    return (folder / RUN_FILE).is_file()


def merged_model(folder: Path) -> Path | None:
    """The merged model of a run; None where there is none, or one that was made before the run was trained again."""
    made = origin(folder / MERGED)
    if made is None or not (folder / MANIFEST).is_file():
        return None
    return folder / MERGED if made.get("manifest_sha256") == file_sha256(folder / MANIFEST) else None


def origin(folder: Path) -> dict[str, Any] | None:
    """Which run the merged model in a folder was made from: folder, run_id, method, manifest_sha256.

    Raises:
        ArtifactError: what says so is damaged.
    """
    file = folder / ORIGIN
    return parse_object(file.read_bytes(), file) if file.is_file() else None


def resolved(folder: Path) -> Path:
    """The folder to load a backbone from: for a run that of its merged model, for all else the folder itself.

    Raises:
        UsageError: a run that is not finished, or not merged yet.
    """
    if not is_run(folder):
        return folder
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"backbone.name: the run {folder} is not finished: run its command again")
    merged = merged_model(folder)
    if merged is None:
        raise UsageError(
            f"backbone.name: {folder} is a run whose merged model is not there yet; `peftkit train` makes it, and in "
            "Python merge_backbone(run) before prepare(run)"
        )
    return merged
