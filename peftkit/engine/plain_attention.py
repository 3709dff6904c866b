"""Attention by its formula, softmax(Q Kᵀ · scaling + mask) V, with dropout of bytes.

torch's own function computes by the formula wherever there is dropout on a CPU, draws that slowly and keeps four
matrices of scores; here two are kept, one of them of bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit.backbones.attention_inputs import Attention
from peftkit.engine.dropout import Draw, masked

LONGEST = 256
"""Keys up to which the formula is faster in half precision without dropout."""
SHORTEST = 32
"""Keys from which it is faster in full precision with dropout."""


class PlainAttention:
    """Attends for torch's function where that is slower."""

    def __init__(self, draw: Draw, always: bool) -> None:
        self.draw, self.always = draw, always

    def __call__(self, given: Attention, dropout: float, scaling: float | None) -> Tensor | None:
        """(batch, queries, heads, width); None where it is left to torch's function."""
        if given.position_bias is not None or not (self.always or is_faster(given, dropout)):
            return None
        scale = given.query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value, mask = given[:4]
        if given.causal:
            mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        found: Tensor = _Plain.apply(query, key, value, mask, scale, dropout, self.draw)
        return found.transpose(1, 2)


def is_faster(given: Attention, dropout: float) -> bool:
    """Whether the formula is faster than torch's function on this device, for this dtype and length.

    That has fused kernels for CPUs without dropout, and good ones in full precision only. Measured forward and backward
    on an Intel Xeon with AMX: with bfloat16 of 16, 32, 128 and 512 keys the formula takes 0.11, 0.25, 0.61 and 1.19 of
    its time, with dropout 0.82, 0.73, 0.64 and 0.50; with float32 and dropout 1.07, 0.90, 0.77 and 0.61.
    """
    if given.query.device.type != "cpu":
        return False
    half, keys = given.query.dtype in (torch.bfloat16, torch.float16), given.key.shape[2]
    if dropout:
        return half or keys >= SHORTEST
    return half and keys <= LONGEST


class _Plain(torch.autograd.Function):
    """Of queries, keys and values (batch, heads, tokens, width), and a mask that is broadcast to the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
        draw: Draw,
    ) -> Tensor:
        query, key, value = (one.contiguous() for one in (query, key, value))
        scores = (query @ key.transpose(-1, -2)).mul_(scale)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores += mask
        weights = scores.softmax(-1)
        keep = draw(weights, dropout) if dropout else None
        ctx.scale, ctx.kept_scale = scale, 1 / (1 - dropout) if dropout else 1.0
        output = _dropped(weights, keep, ctx.kept_scale) @ value
        ctx.save_for_backward(query, key, value, weights, keep, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, keep, output = ctx.saved_tensors
        by_value = _dropped(weights, keep, ctx.kept_scale).transpose(-1, -2) @ gradient
        scores = _dropped(gradient @ value.transpose(-1, -2), keep, ctx.kept_scale)
        # Σⱼ weightᵢⱼ · its gradient, which the softmax takes off, is Σ outputᵢ · its gradient
        scores = scores.sub_((gradient * output).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        return scores @ key, scores.transpose(-1, -2) @ query, by_value, None, None, None, None


def _dropped(values: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    return values if keep is None else masked(values, keep, scale)
