"""What a safetensors file says it holds, checked before any tensor is built. Looking needs no torch."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ArtifactError
from peftkit.schema import shown

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER = 2**23
"""Bytes of a header; one of a thousand layers with full names has about a tenth of that."""
MOST_DIMENSIONS = 64  # torch's own limit
BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of a number, by the name that safetensors gives its type."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    """Bytes between the header and it."""


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name; only its header is read.

    Raises:
        ArtifactError: not a plain file, or one whose header is too large, damaged, or at odds with the file's size.
    """
    size = plain_size(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ArtifactError(f"{file} is cut short: it ends inside its header; restore it")
        if length > MOST_HEADER:
            raise ArtifactError(
                f"{file} has a header of {length:,} bytes, and {MOST_HEADER:,} are the most that is read"
            )
        header = parse_object(stream.read(length), file)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ArtifactError(f"{file}: the header's __metadata__ holds something else than texts; restore it")
    entries = {name: _entry(file, name, value) for name, value in header.items()}
    _check_layout(file, [(value["data_offsets"], entries[name]) for name, value in header.items()], size - 8 - length)
    return entries


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, once its header was found sound. Raises as `read_header` does."""
    from safetensors.torch import load_file

    read_header(file)
    tensors: dict[str, Tensor] = load_file(file)
    return tensors


def parse_object(text: bytes | str, file: Path) -> dict[str, Any]:
    """A JSON object without repeated keys, of which readers take now the first and now the last.

    Raises:
        ArtifactError: not JSON, not an object, a repeated key, or values that JSON does not have.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {shown(str(error), 200)}; restore it") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is damaged: it holds no JSON object; restore it")
    return found


def plain_size(file: Path) -> int:
    """The size of what must be a plain file: a link may lead anywhere, and a pipe never ends.

    Raises:
        ArtifactError: it is missing or something else.
    """
    try:
        found = file.lstat()
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}; the folder is not whole") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no plain file"
        raise ArtifactError(f"{file} is {kind}; put the file itself there")
    return found.st_size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _entry(file: Path, name: str, value: Any) -> Entry:
    shape = value.get("shape") if isinstance(value, dict) else None
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    whole = all(
        isinstance(numbers, list) and all(type(one) is int and 0 <= one < 2**63 for one in numbers)
        for numbers in (shape, offsets)
    )
    sized = whole and len(shape) <= MOST_DIMENSIONS and len(offsets) == 2  # type: ignore[arg-type]
    if not sized or str(value.get("dtype")) not in BYTES:
        raise ArtifactError(f"{file}: the header says nothing readable of '{shown(name)}'; restore the file")
    return Entry(value["dtype"], tuple(shape), offsets[0])  # type: ignore[arg-type, index]


def _check_layout(file: Path, places: list[tuple[list[int], Entry]], size: int) -> None:
    """Tensors must follow each other without gaps or overlaps, and fill the file."""
    end = 0
    for (start, stop), entry in sorted(places, key=lambda place: place[0]):
        if start != end or stop - start != math.prod(entry.shape) * BYTES[entry.dtype]:
            raise ArtifactError(f"{file}: the places of its tensors do not fit their shapes; restore it")
        end = stop
    if end != size:
        raise ArtifactError(f"{file} holds {size:,} bytes of tensors where its header tells of {end:,}; restore it")
