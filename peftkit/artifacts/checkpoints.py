"""Checkpoints tensor by tensor: reading one alone, and writing a file of which no more than one is held."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ArtifactError
from peftkit.tensor_files import BYTES, Entry, read_header

if TYPE_CHECKING:
    from torch import Tensor, dtype

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"} | {
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""safetensors' names of torch's types."""
ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""In which safetensors sorts them; the last come first."""
PIECE = 2**24
"""Numbers of a tensor that are held at once where it is only passed on."""


class Checkpoint:
    """Tensors in safetensors files, read one by one; nothing is mapped, so that nothing stays held."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads the headers.

        Raises:
            ArtifactError: a file that is damaged, or a tensor that is in two files.
        """
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in files:
            header = read_header(file)
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                if name in self.entries:
                    raise ArtifactError(f"{file} and {self._places[name][0]} both hold '{name}'; remove the stale one")
                self.entries[name] = entry
                self._places[name] = (file, start + entry.start)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            ArtifactError: of a type that models are not held in, or cut short.
        """
        entry = self.entries[name]
        return self._read(name, 0, math.prod(entry.shape)).view(entry.shape)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The numbers of a tensor, piece by piece. Raises as `read` does."""
        total = math.prod(self.entries[name].shape)
        for start in range(0, max(total, 1), PIECE):
            yield self._read(name, start, min(PIECE, total - start))

    def _read(self, name: str, start: int, count: int) -> Tensor:
        import torch

        entry, (file, offset) = self.entries[name], self._places[name]
        known = {theirs: getattr(torch, ours) for ours, theirs in NAMES.items()}
        if entry.dtype not in known:
            raise ArtifactError(f"{file}: '{name}' is held in {entry.dtype}, which is no type of a model's weights")
        tensor = torch.empty(count, dtype=known[entry.dtype])
        view, done = bytes_of(tensor), 0
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset + start * BYTES[entry.dtype])
            while done < len(view):
                read = stream.readinto(view[done:])
                if not read:
                    raise ArtifactError(f"{file} is cut short inside '{name}'; restore it")
                done += read
        return tensor


def write_file(
    file: Path, tensors: Mapping[str, tuple[dtype, Sequence[int]]], make: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a file as safetensors does, byte for byte, one tensor after the other.

    Args:
        tensors: types and shapes by name.
        make: gives the pieces of a tensor, when its turn has come.

    Raises:
        ArtifactError: `make` gave another type, or more or fewer numbers.
    """
    order, header = _header(tensors)
    with file.open("wb") as stream:
        stream.write(header)
        for name in order:
            kind, shape = tensors[name]
            count = 0
            for piece in make(name):
                count += piece.numel() if piece.dtype == kind else 0
                stream.write(bytes_of(piece.detach().contiguous()))
            if count != math.prod(shape):
                raise ArtifactError(f"'{name}' is no {kind} of {tuple(shape)} any more; merge without --streaming")


def _header(tensors: Mapping[str, tuple[dtype, Sequence[int]]]) -> tuple[list[str], bytes]:
    """The tensors in the order of the file, and what stands before them."""
    kinds = {name: NAMES[str(kind).removeprefix("torch.")] for name, (kind, _) in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ORDER.index(kinds[name]), name.encode()))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        end = start + math.prod(tensors[name][1]) * BYTES[kinds[name]]
        entries[name] = {"dtype": kinds[name], "shape": list(tensors[name][1]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, whatever its type; numpy itself has no bfloat16."""
    import torch

    plain: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(plain)
