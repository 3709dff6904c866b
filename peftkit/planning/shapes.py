"""Models without values: shapes, types and devices, on which any code runs at no cost in memory.

Tensors of a batch that are there (token ids, masks, labels) keep their values, and so does what follows from them
alone: code that looks at a mask, or picks the supervised positions, goes the way that it goes in the run. What depends
on weights has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from peftkit.planning.ledger import Ledger, _flat, aten

if TYPE_CHECKING:
    from torch import nn

LARGEST_KNOWN = 2**21
"""Numbers in a tensor that is still computed with its values; only masks could be larger."""


class NeedsValues(Exception):
    """The code looks at a number that depends on the weights."""


class Shapes(Ledger):
    """A ledger over a model without values."""

    def __init__(self, held: Callable[[int], int] = int) -> None:
        super().__init__(held)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def without_values(self, model: nn.Module) -> nn.Module:
        """Turn what a model on the meta device holds into tensors that pass for those of a CPU, in place."""
        known: dict[int, Any] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if id(tensor) not in known:
                            known[id(tensor)] = (tensor, self._without_value(tensor))
                        held[name] = known[id(tensor)][1]  # a tied one stays tied
        return model

    def _without_value(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or (not tensor.is_meta and not isinstance(tensor, torch.nn.Parameter)):
            return tensor
        fake = FakeTensor(self.mode, tensor.detach().to("meta"), torch.device("cpu"))
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = [one for one in _flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
        known = [one for one in inputs if not isinstance(one, FakeTensor)]
        if any(one.is_meta for one in known):
            # a tensor that a module keeps in a place of its own
            args, kwargs = tree_map_only(Tensor, self._without_value, (args, kwargs))
            return self.call(func, args, kwargs)
        if len(known) < len(inputs):
            if func is aten._local_scalar_dense.default:
                raise NeedsValues
            return func(*(_with_places(args) if known else args), **kwargs)
        if inputs and self._small(inputs):
            return func(*args, **kwargs)
        with self.mode:
            shape = func(*args, **kwargs)
        if not inputs and self._worth_knowing(shape):
            return func(*args, **kwargs)
        return shape

    def _small(self, inputs: list[Tensor]) -> bool:
        """Whether a result is surely small: no larger than all inputs broadcast together."""
        shapes = (tuple(reversed(one.shape)) for one in inputs)
        return math.prod(map(max, zip_longest(*shapes, fillvalue=1))) <= LARGEST_KNOWN

    def _worth_knowing(self, result: Any) -> bool:
        return isinstance(result, Tensor) and not result.is_floating_point() and result.numel() <= LARGEST_KNOWN


def _with_places(args: Any) -> Any:
    """Where a mask with values picks from a tensor without, the places it picks: their number is what is known."""
    if not any(isinstance(one, (list, tuple)) for one in args):
        return args
    return [_places(one) if isinstance(one, (list, tuple)) else one for one in args]


def _places(indices: Any) -> Any:
    found: list[Any] = []
    for one in indices:
        if isinstance(one, Tensor) and one.dtype == torch.bool and not isinstance(one, FakeTensor):
            found.extend(one.nonzero(as_tuple=True))
        else:
            found.append(one)
    return found
