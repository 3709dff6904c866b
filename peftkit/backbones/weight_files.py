"""The files that hold a checkpoint's weights: which there are, whether all are, and what they hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from peftkit.disk import file_sha256
from peftkit.errors import BackboneError
from peftkit.tensor_files import parse_object

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order; never pickled weights."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if files:
        _refuse_missing(folder)
        return files
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = (
        f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors first"
        if pickled
        else "; it needs model.safetensors (or its shards)"
    )
    raise BackboneError(f"no weights in {folder}{hint}")


def _refuse_missing(folder: Path) -> None:
    """Refuse a checkpoint without some of the files that its index names."""
    index = folder / INDEX
    if not index.is_file():
        return
    named = parse_object(index.read_bytes(), index).get("weight_map")
    for name in sorted(set(named.values())) if isinstance(named, dict) else ():
        if not (folder / str(name)).is_file():
            raise BackboneError(
                f"{folder / str(name)} is missing, and {INDEX} names it; restore it, or get the model again"
            )


def weights_sha256(files: Iterable[Path]) -> str:
    """One hash over the names and contents of weight files."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return total.hexdigest()
