"""Dropout from wide random words, or by compiled code: torch's own draws one number of 32 bits an element on CPUs, and
keeps its mask as floats.

What is drawn is either a mask, a byte an element that is 0 where one falls, or the seed by which compiled code finds
them (`compiled_dropout.py`): `masked` takes both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftkit.engine import compiled_dropout

Draw = Callable[[Tensor, float], Tensor]
"""Which elements of a tensor fall, with a probability below 1: a mask of its shape, or a seed."""
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


def drawn_seed(values: Tensor, probability: float) -> Tensor:
    """A seed, where compiled code takes such values; else a mask."""
    draw = compiled_dropout.seed_for if compiled_dropout.suits(values, probability) else keep_mask
    return draw(values, probability)


def is_seed(drawn: Tensor) -> bool:
    """Whether what was drawn is a seed, and no mask."""
    return drawn.dtype == torch.int64


def masked(values: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """scale · values · mask, in the dtype of `values`; `mask` may be a seed."""
    if is_seed(mask):
        return compiled_dropout.dropped(values, mask, scale)
    factors = mask.to(values.dtype)
    if scale == 1.0:
        return factors.mul_(values)
    return torch.addcmul(values.new_zeros(()), values, factors, value=scale, out=factors)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, probability: float, draw: Draw) -> Tensor:
        mask = draw(values, probability)
        ctx.scale = 1 / (1 - probability)
        ctx.save_for_backward(mask)
        return masked(values, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(gradient, mask, ctx.scale), None, None


def dropout(values: Tensor, probability: float, draw: Draw = keep_mask) -> Tensor:
    """`values`, each 0 with `probability` and else divided by 1 − `probability`, which is below 1."""
    dropped: Tensor = _Dropout.apply(values, probability, draw)
    return dropped


@contextlib.contextmanager
def fast_dropout(model: nn.Module, draw: Draw = keep_mask) -> Iterator[None]:
    """Let the dropout modules of a model draw by `draw`."""
    parts = [part for part in model.modules() if type(part) is nn.Dropout and not part.inplace]
    for part in parts:
        part.forward = partial(_forward, part, draw)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _forward(part: nn.Dropout, draw: Draw, values: Tensor) -> Tensor:
    if part.training and 0 < part.p < 1 and values.device.type == "cpu":
        return dropout(values, part.p, draw)
    return nn.Dropout.forward(part, values)
