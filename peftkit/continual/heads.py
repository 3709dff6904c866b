"""The heads of tasks beside the part of a model that they share."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from peftkit.methods.base import inside, trained_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

Tensors = Mapping[str, "Tensor"]


def head_of(model: nn.Module, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Copies of what trains in the head, by name in the model.

    Args:
        heads: names of the head's modules, as `Backbone.head_modules` has them.
    """
    return {name: p.detach().clone() for name, p in trained_parameters(model).items() if inside(name, heads)}


def shared_part(model: nn.Module, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """What trains outside of the head: the adapter, or the backbone."""
    return {name: p.detach() for name, p in trained_parameters(model).items() if not inside(name, heads)}


def digest(tensors: Tensors) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def worn(model: nn.Module, head: Tensors) -> Iterator[None]:
    """`model` with another task's head, which may have other labels and does not train; afterwards with its own."""
    from torch import nn

    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in head]
    own = [module._parameters[leaf] for module, leaf, _ in places]
    try:
        for (module, leaf, name), parameter in zip(places, own, strict=True):
            assert parameter is not None
            module._parameters[leaf] = nn.Parameter(head[name].to(parameter.device), requires_grad=False)
        yield
    finally:
        for (module, leaf, _), parameter in zip(places, own, strict=True):
            module._parameters[leaf] = parameter
