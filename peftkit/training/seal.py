"""A checkpoint's manifest: what its files are, written last and checked before anything of them is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
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

Described = dict[str, dict[str, Any]]
"""Name of a file → its `size` and `sha256`."""


def seal(folder: Path, step: int, best: Described) -> None:
    """Write the manifest of a checkpoint whose files are all there.

    Args:
        best: the file of the weights that scored best until then, which lies beside the checkpoint; empty without.
    """
    manifest = {"format": FORMAT, "step": step, "files": described(sorted(folder.iterdir())), "best": best}
    text = json.dumps(manifest | {"sha256": manifest_sha256(manifest)}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def check_sealed(folder: Path, names: Collection[str], with_best: bool = True) -> Described:
    """Refuse a checkpoint that is not, to the byte, what was sealed; returns what it says of its best weights.

    Args:
        names: the files that every checkpoint has beside its manifest.
        with_best: read the best weights too.

    Raises:
        ArtifactError: names the file, and what is wrong with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is {'a link' if folder.is_symlink() else 'no folder'}")
    manifest = _read(folder / MANIFEST)
    if folder.name != f"step-{manifest.get('step')}":
        raise ArtifactError(
            f"{folder} is the checkpoint of step {manifest.get('step')} under another name, or has its {MANIFEST}"
        )
    files, best = _table(folder, manifest, "files"), _table(folder, manifest, "best")
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if files.keys() != set(names) or len(best) > 1 or not all(map(BEST.fullmatch, best)):
        raise ArtifactError(f"{folder / MANIFEST} does not name the files of a checkpoint")
    for name in sorted(found ^ files.keys()):
        raise ArtifactError(f"{folder / name} is {'missing' if name in files else 'none of its files'}")
    _check_files({folder / name: one for name, one in files.items()})
    if with_best:
        _check_files({folder.parent / name: one for name, one in best.items()})
    return best


def described(files: Sequence[Path]) -> Described:
    """Size and hash of files, by name."""
    table = zip(files, map(plain_size, files), _hashes(files), strict=True)
    return {file.name: {"size": size, "sha256": digest} for file, size, digest in table}


def _check_files(table: dict[Path, dict[str, Any]]) -> None:
    """What is cheap comes first, and of all files."""
    for file, expected in table.items():
        if (size := plain_size(file)) != expected["size"]:
            raise ArtifactError(f"{file} has {size:,} bytes, and {expected['size']:,} were written")
    for file, digest in zip(table, _hashes(list(table)), strict=True):
        if digest != table[file]["sha256"]:
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


def _table(folder: Path, manifest: dict[str, Any], name: str) -> Described:
    table = manifest.get(name)
    entries = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(one, dict) and one.keys() == {"size", "sha256"} for one in entries):
        raise ArtifactError(f"{folder / MANIFEST} does not say what its {name} are")
    return dict(table)  # type: ignore[arg-type]


def _hashes(files: Sequence[Path]) -> list[str]:
    """Several at a time, because hashing is most of what a checkpoint costs."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_sha256, files))
