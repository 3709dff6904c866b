"""What a finished run says of itself, read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkit.config import Run
from peftkit.config import load_run as load_config
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError, ConfigError, UsageError
from peftkit.session import MANIFEST, RUN_FILE

FORMAT = 1


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
    if manifest.pop("sha256", None) != manifest_sha256(manifest):
        raise ArtifactError(f"{file} changed after it was written; restore it, or train again")
    return manifest


def read_saved_config(folder: Path) -> Run:
    """The resolved configuration of a run."""
    try:
        return load_config(folder / RUN_FILE)
    except ConfigError as error:
        raise ArtifactError(f"{folder / RUN_FILE} does not fit this version of peftkit: {error}") from error


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse files that are not what the manifest says.

    Raises:
        ArtifactError: one is missing, or changed.
    """
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; the run is not whole: restore it, or train again")
        if file_sha256(file) != expected:
            raise ArtifactError(
                f"{file} changed after it was written (its sha256 differs from {MANIFEST}'s); "
                "restore it, or train again"
            )
