"""LoRA on frozen projections of one input, as one autograd function.

What is kept for the backward pass is what A was given once, what dropout drew, and the narrow A x. Weights A and B are
cast to the dtype of the input inside; their gradients come in their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from peftkit.engine.compiled_dropout import add_dropped
from peftkit.engine.dropout import Draw, is_seed, keep_mask, masked

CACHED = 2**18
"""Elements of which a processor's own cache holds several in half precision."""


class Packed(Protocol):
    """A layer whose weight stands in few bits."""

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in)."""


@dataclass(frozen=True)
class Projection:
    """W x + b + scale · B A x, of which A (rank × in) and B (out × rank) train."""

    weight: Tensor | Packed
    """Unpacked for each product: no copy of it lives from the forward pass to the backward pass."""
    bias: Tensor | None
    down: Tensor
    """A."""
    up: Tensor
    """B."""
    scale: float
    transposed: bool = False
    """`weight` is (in, out), as GPT-2's are, and not (out, in)."""


def project(
    inputs: Tensor, projections: Sequence[Projection], dropout: float = 0.0, draw: Draw = keep_mask
) -> tuple[Tensor, ...]:
    """The output of each projection for `inputs` (…, in).

    Args:
        dropout: of what A is given. The projections share one mask, as those of one matrix do in the code of the
            LoRA paper (loralib's MergedLinear).
        draw: what draws that mask, or a seed for it.
    """
    # views made inside could not be changed in place outside, as DeBERTa does
    outputs = _Project.apply(
        inputs.reshape(-1, inputs.shape[-1]),
        dropout,
        draw,
        [one.scale for one in projections],
        [one.transposed for one in projections],
        *(one.weight for one in projections),
        *(one.bias for one in projections),
        *(one.down for one in projections),
        *(one.up for one in projections),
    )
    return tuple(output.view(*inputs.shape[:-1], -1) for output in outputs)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropout: float,
        draw: Draw,
        scales: list[float],
        transposed: list[bool],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = _quarters(tensors)
        dtype = inputs.dtype
        mask = draw(inputs, dropout) if dropout else None
        down = torch.cat(downs).to(dtype)
        # B is narrow: what is multiplied into it costs nothing
        ups = [(up * (scale / (1 - dropout))).to(dtype) for up, scale in zip(ups, scales, strict=True)]
        ranks = [len(one) for one in downs]
        given = inputs if mask is None else masked(inputs, mask)
        hidden = linear(given, down)
        outputs = []
        for weight, bias, up, low, is_transposed in zip(
            weights, biases, ups, hidden.split(ranks, dim=1), transposed, strict=True
        ):
            bias = None if bias is None else bias.to(dtype)
            output = linear(inputs, _matrix(weight, is_transposed, dtype), bias)
            outputs.append(output.addmm_(low, up.t()))
        ctx.ranks, ctx.transposed = ranks, transposed
        ctx.packed = [None if isinstance(weight, Tensor) else weight for weight in weights]
        ctx.dtypes = [one.dtype for one in tensors[2 * len(scales) :]]
        ctx.scales = [scale / (1 - dropout) for scale in scales]
        ctx.set_materialize_grads(False)
        frozen = [weight if ctx.needs_input_grad[0] and isinstance(weight, Tensor) else None for weight in weights]
        ctx.save_for_backward(given, mask, hidden, down, *frozen, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count, needs_input = len(gradients), ctx.needs_input_grad[0]
        given, mask, hidden, down, *others = ctx.saved_tensors
        weights = [own if layer is None else layer for own, layer in zip(others[:count], ctx.packed, strict=True)]
        ups = others[count:]
        needs_down, needs_up = ctx.needs_input_grad[-2 * count : -count], ctx.needs_input_grad[-count:]
        total: Tensor | None = None
        lows: list[Tensor] = []
        up_gradients: list[Tensor | None] = []
        for gradient, weight, up, low, scale, is_transposed, needs in zip(
            gradients, weights, ups, hidden.split(ctx.ranks, dim=1), ctx.scales, ctx.transposed, needs_up, strict=True
        ):
            if gradient is None:
                lows.append(torch.zeros_like(low))
                up_gradients.append(None)
                continue
            lows.append(gradient @ up)
            # the wide factor last: in the other order the product takes several times as long
            up_gradients.append((low.t() @ gradient).t() * scale if needs else None)
            if needs_input:
                weight = _matrix(weight, is_transposed, gradient.dtype)
                total = gradient @ weight if total is None else total.addmm_(gradient, weight)
        gathered = torch.cat(lows, dim=1)
        down_gradients: list[Tensor | None] = [None] * count
        if any(needs_down):
            down_gradients = list((gathered.t() @ given).split(ctx.ranks))
        if total is not None:
            total = total.addmm_(gathered, down) if mask is None else _add_masked(total, gathered, down, mask)
        trained = zip([*down_gradients, *up_gradients], ctx.dtypes, strict=True)
        return (total, *[None] * (4 + 2 * count), *(_own(one, dtype) for one, dtype in trained))


def _add_masked(total: Tensor, low: Tensor, down: Tensor, mask: Tensor) -> Tensor:
    """`total` + mask · (low @ down), in place, by so many rows that what is made in between stays in the cache."""
    width = total.shape[1]
    step = max(32, CACHED // width)
    for start in range(0, len(total), step):
        rows = slice(start, start + step)
        if is_seed(mask):
            add_dropped(total[rows], low[rows] @ down, mask, start * width)
        else:
            total[rows].addcmul_(low[rows] @ down, mask[rows].to(total.dtype))
    return total


def _matrix(weight: Tensor | Packed, is_transposed: bool, dtype: torch.dtype) -> Tensor:
    """W (out, in)."""
    if not isinstance(weight, Tensor):
        return weight.unpacked(dtype)
    return weight.t() if is_transposed else weight


def _quarters(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    count = len(tensors) // 4
    return tuple(list(tensors[start : start + count]) for start in range(0, 4 * count, count))


def _own(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return gradient if gradient is None else gradient.to(dtype).contiguous()
