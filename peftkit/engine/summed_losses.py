"""Σ loss of projected rows, with gradients that are formed in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK = 2**22
"""Logits that are formed at once; 16 MiB in float32."""
LEAST = 256
"""Items that are taken at once, however large the vocabulary is: each time, all of the projection's weight is read."""
Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Float32 logits (items, vocabulary) and labels (items,) to losses (items,) and their gradients by the logits."""


def items_at_once(vocabulary: int) -> int:
    """Of how many items logits are formed together."""
    return max(LEAST, CHUNK // vocabulary)


class SummedLosses(torch.autograd.Function):
    """Of rows (items, width), a weight (vocabulary, width), a bias or None, and labels (items,); a float32 scalar."""

    @staticmethod
    def forward(
        context: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Losses
    ) -> Tensor:
        wanted = context.needs_input_grad[:3]
        given = rows.dtype, weight.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        by_rows = torch.empty_like(rows, dtype=given[0]) if wanted[0] else None
        by_weight = torch.zeros_like(weight, dtype=given[1]) if wanted[1] else None
        by_bias = weight.new_zeros(weight.shape[0], dtype=given[1]) if wanted[2] else None
        total = torch.zeros((), device=rows.device).float()
        size = items_at_once(weight.shape[0])
        for start in range(0, len(rows), size):
            own = slice(start, start + size)
            found, gradient = losses(linear(rows[own], weight, bias).float(), labels[own])
            total += found.sum()
            if by_bias is not None:
                by_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if by_rows is not None:
                by_rows[own] = gradient @ weight
            if by_weight is not None:
                by_weight += gradient.T @ rows[own]
        context.gradients = by_rows, by_weight, by_bias
        return total

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if one is None else one * outer[0].to(one.dtype) for one in context.gradients)
        return (*scaled, None, None)
