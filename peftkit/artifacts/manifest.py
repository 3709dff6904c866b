"""What a finished run says of itself, read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from peftkit.backbones.load import Head
from peftkit.backbones.runs import BUNDLED, MANIFEST, RUN_FILE
from peftkit.backbones.task_model import MODEL_CLASSES
from peftkit.config import Run
from peftkit.config import load_run as load_config
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError, ConfigError, UsageError
from peftkit.schema import shown
from peftkit.tensor_files import parse_object, plain_size

FORMAT = 1
MOST_BYTES = 2**26
"""Of a manifest; labels and tokens that a run added are the longest part of it."""

MOST_NAMES = 2**16
"""Labels, or tokens that a task added."""


class _Origin(BaseModel):
    model_config = ConfigDict(strict=True)

    weights_sha256: str
    folder: str | None


class _Shape(BaseModel):
    """What of a manifest is read back, for its types."""

    model_config = ConfigDict(strict=True, extra="forbid")  # which holds for the head too

    run_id: str
    artifact: str
    files: dict[str, str]
    backbone: _Origin
    head: Head
    trained_heads: list[str]


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
    if plain_size(file) > MOST_BYTES:
        raise ArtifactError(f"{file} is larger than {MOST_BYTES:,} bytes; it is no manifest of a run")
    manifest = parse_object(file.read_bytes(), file)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file} has format {manifest.get('format')}; this peftkit reads format {FORMAT}")
    if manifest.pop("sha256", None) != manifest_sha256(manifest):
        raise ArtifactError(f"{file} changed after it was written; restore it, or train again")
    _check_shape(file, manifest)
    return manifest


def _check_shape(file: Path, manifest: dict[str, Any]) -> None:
    try:
        _Shape.model_validate_json(json.dumps({name: manifest.get(name) for name in _Shape.model_fields}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{file} is damaged: {shown(place)}: {first['msg']}; restore it, or train again") from None
    head = Head.from_dict(manifest["head"])
    if head.model_class not in MODEL_CLASSES:
        raise ArtifactError(f"{file}: head.model_class '{shown(head.model_class)}' is no class of a task; restore it")
    if (
        not 0 <= (head.outputs or 0) <= max(2, len(head.labels))
        or max(map(len, (head.labels, head.new_tokens))) > MOST_NAMES
    ):
        raise ArtifactError(f"{file}: the head has more outputs, labels or new tokens than a task gives it; restore it")


def read_saved_config(folder: Path) -> Run:
    """The resolved configuration of a run; that of a bundle names the backbone inside of it."""
    try:
        run = load_config(folder / RUN_FILE)
    except ConfigError as error:
        raise ArtifactError(f"{folder / RUN_FILE} does not fit this version of peftkit: {error}") from error
    if not (folder / BUNDLED).is_dir():
        return run
    inside = {"name": str((folder / BUNDLED).absolute()), "revision": None}
    return run.model_copy(update={"backbone": run.backbone.model_copy(update=inside)})


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
