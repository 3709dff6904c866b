"""Dropout from wide random words: torch's own draws one number of 32 bits an element on CPUs, and keeps its mask as
floats."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = 256
"""Values of a random byte."""
OFTEN = 0.9
"""Above this rate bytes leave too much to be drawn one by one."""


def keep_mask(values: Tensor, probability: float) -> Tensor:
    """A byte for each of `values`, 0 with exactly `probability` and else 1, each by itself; from torch's global
    generator.

    A byte drops what is below ⌊256 p⌋. Of what that keeps, a share q must go too, so that the rate is p: a Poisson
    number of places, with mean −n·log(1 − q), is drawn with repetition, and the chance of a place to be among them is
    q, independently of all others.
    """
    count = values.numel()
    if values.device.type != "cpu" or probability > OFTEN:
        return plain_mask(values, probability)
    words = values.new_empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    level = math.floor(probability * LEVELS)
    mask = words.view(torch.uint8)[:count].ge_(level)
    rest = (probability * LEVELS - level) / (LEVELS - level)
    if rest and count:
        places = int(torch.poisson(torch.tensor(-math.log1p(-rest) * count, dtype=torch.float64)))
        mask.index_fill_(0, torch.randint(count, (places,)), 0)
    return mask.view(values.shape)


def plain_mask(values: Tensor, probability: float) -> Tensor:
    """The same as torch draws it."""
    return values.new_empty(values.shape, dtype=torch.uint8).bernoulli_(1 - probability)


def masked(values: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """scale · values · mask, in the dtype of `values`."""
    factors = mask.to(values.dtype)
    if scale == 1.0:
        return factors.mul_(values)
    return torch.addcmul(values.new_zeros(()), values, factors, value=scale, out=factors)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, probability: float) -> Tensor:
        mask = keep_mask(values, probability)
        ctx.scale = 1 / (1 - probability)
        ctx.save_for_backward(mask)
        return masked(values, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return masked(gradient, mask, ctx.scale), None


def dropout(values: Tensor, probability: float) -> Tensor:
    """`values`, each 0 with `probability` and else divided by 1 − `probability`, which is below 1."""
    dropped: Tensor = _Dropout.apply(values, probability)
    return dropped


@contextlib.contextmanager
def fast_dropout(model: nn.Module) -> Iterator[None]:
    """Let the dropout modules of a model draw their masks by `keep_mask`."""
    parts = [part for part in model.modules() if type(part) is nn.Dropout and not part.inplace]
    for part in parts:
        part.forward = partial(_forward, part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _forward(part: nn.Dropout, values: Tensor) -> Tensor:
    if part.training and 0 < part.p < 1 and values.device.type == "cpu":
        return dropout(values, part.p)
    return nn.Dropout.forward(part, values)
