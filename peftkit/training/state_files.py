"""Trees of tensors and plain values as two files, safetensors and JSON, which read back as what they were.

Nothing in them can run when they are read, as a pickle can.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.tensor_files import parse_object

if TYPE_CHECKING:
    from torch import Tensor

TENSORS, VALUES = ".safetensors", ".json"
"""How the names of the two files of a tree end."""


def write_tree(tree: Any, folder: Path, name: str) -> None:
    """Write a tree of dictionaries, lists, tuples, tensors, numbers, texts, booleans and None.

    Raises:
        TypeError: something else is in it.
    """
    from safetensors.torch import save_file

    values, tensors = split(tree)
    save_file(tensors, folder / f"{name}{TENSORS}")
    (folder / f"{name}{VALUES}").write_text(json.dumps({"tree": values}, allow_nan=False), encoding="utf-8")


def read_tree(folder: Path, name: str) -> Any:
    """What `write_tree` wrote.

    Raises:
        ArtifactError: damaged files.
    """
    from safetensors.torch import load_file

    file = folder / f"{name}{VALUES}"
    return join(parse_object(file.read_bytes(), file)["tree"], load_file(folder / f"{name}{TENSORS}"))


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree as JSON has it, and its tensors by the names that stand in their places; one that is there twice once."""
    tensors: dict[str, Tensor] = {}
    return _plain(tree, tensors, {}), tensors


def join(values: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `split` took apart."""
    if isinstance(values, list):
        return [join(one, tensors) for one in values]
    if not isinstance(values, dict):
        return values
    ((kind, inner),) = values.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(join(one, tensors) for one in inner)
    if kind == "float":
        return float(inner)
    return {key: join(one, tensors) for key, one in inner}


def _plain(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """JSON's own kinds as they are, any other as an object of one key, which says what it is."""
    from torch import is_tensor

    if is_tensor(value):
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = _alone(value.detach().cpu().contiguous())
        return {"tensor": names[id(value)]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, dict):
        return {"dict": [[_key(key), _plain(one, tensors, names)] for key, one in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(one, tensors, names) for one in value]}
    if isinstance(value, list):
        return [_plain(one, tensors, names) for one in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


def _alone(tensor: Tensor) -> Tensor:
    """safetensors refuses tensors that are parts of one, and may be views of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"a checkpoint cannot hold the key {key!r}")
    return key
