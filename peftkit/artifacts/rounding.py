"""Casting once, to the nearest number that a smaller dtype has."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn


def rounded(values: Tensor, to: dtype) -> Tensor:
    """`values` in another dtype, rounded once; integers stay what they are.

    torch goes from float64 to 16 bits through float32, which rounds twice. Here the step between is rounded to odd
    (Boldo and Melquiond 2008): where it is not exact, to that of both neighbours whose last bit is 1, after which the
    second rounding gives the nearest number to the first one.
    """
    import torch

    if not values.is_floating_point():
        return values
    if values.dtype is not torch.float64 or to.itemsize > 2:
        return values.to(to)
    near = values.float()
    back = near.double()
    towards = torch.where(values > back, torch.inf, -torch.inf).float()
    is_even = (near.view(torch.int32) & 1) == 0
    return torch.where((back != values) & is_even, torch.nextafter(near, towards), near).to(to)


def round_model(model: nn.Module, to: dtype) -> nn.Module:
    """Cast all floating point numbers of a model, in place; returns it."""
    import torch

    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dtype is torch.float64:
            tensor.data = rounded(tensor.data, to)
    return model.to(to)
