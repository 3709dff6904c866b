"""A checkpoint's manifest: what its files are, written last and checked before anything of them is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError
from peftkit.tensor_files import parse_object, plain_size, read_header

MANIFEST = "manifest.json"
FORMAT = 1
MOST_MANIFEST = 2**16
"""Bytes; a manifest has about a thousand."""
BEST = re.compile(r"best-\d+\.safetensors")
"""Names of the files of best weights, which lie beside checkpoints, because several may mean the same one."""


def seal(folder: Path, step: int, best: Path | None) -> None:
    """Write the manifest of a checkpoint whose files are all there.

    Args:
        best: the file of the weights that scored best until then, beside the checkpoint.
    """
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": {file.name: _described(file) for file in sorted(folder.iterdir())},
        "best": {best.name: _described(best)} if best else {},
    }
    text = json.dumps(manifest | {"sha256": manifest_sha256(manifest)}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def check_sealed(folder: Path, names: Collection[str]) -> Path | None:
    """Refuse a checkpoint that is not, to the byte, what was sealed; returns the file of its best weights.

    Args:
        names: the files that every checkpoint has beside its manifest.

    Raises:
        ArtifactError: names the file, and what is wrong with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is {'a link' if folder.is_symlink() else 'no folder'}")
    manifest = _read(folder / MANIFEST)
    if folder.name != f"step-{manifest.get('step')}":
        raise ArtifactError(f"{folder} is the checkpoint of step {manifest.get('step')} under another name")
    files, best = _table(folder, manifest, "files"), _table(folder, manifest, "best")
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if files.keys() != set(names) or len(best) > 1 or not all(map(BEST.fullmatch, best)):
        raise ArtifactError(f"{folder / MANIFEST} does not name the files of a checkpoint")
    for name in sorted(found ^ files.keys()):
        raise ArtifactError(f"{folder / name} is {'missing' if name in files else 'none of its files'}")
    described = {folder / name: one for name, one in files.items()}
    described |= {folder.parent / name: one for name, one in best.items()}
    _check_files(described)
    return next((folder.parent / name for name in best), None)


def _check_files(described: dict[Path, dict[str, Any]]) -> None:
    """What is cheap comes first, and of all files."""
    for file, expected in described.items():
        if (size := plain_size(file)) != expected["size"]:
            raise ArtifactError(f"{file} has {size:,} bytes, and {expected['size']:,} were written")
    for file, expected in described.items():
        if file_sha256(file) != expected["sha256"]:
            raise ArtifactError(f"{file} changed after it was written (its sha256 differs from {MANIFEST}'s)")
        if file.suffix == ".safetensors":
            read_header(file)


def _read(file: Path) -> dict[str, Any]:
    if plain_size(file) > MOST_MANIFEST:
        raise ArtifactError(f"{file} is larger than {MOST_MANIFEST:,} bytes; it is no checkpoint's manifest")
    manifest = parse_object(file.read_bytes(), file)
    claimed = manifest.pop("sha256", None)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file} has format {manifest.get('format')}; this peftkit reads format {FORMAT}")
    if claimed != manifest_sha256(manifest):
        raise ArtifactError(f"{file} changed after it was written")
    return manifest


def _table(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    table = manifest.get(name)
    entries = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(one, dict) and one.keys() == {"size", "sha256"} for one in entries):
        raise ArtifactError(f"{folder / MANIFEST} does not say what its {name} are")
    return dict(table)  # type: ignore[arg-type]


def _described(file: Path) -> dict[str, Any]:
    return {"size": plain_size(file), "sha256": file_sha256(file)}
