"""Attention over examples that stand in one row, each to itself, without any padding: compiled code for CPUs.

The scores of one query at a time never leave the cache, so that nothing is kept for the backward pass but what goes in
and comes out; masks of dropout are made again from a seed (`compiled/attention.cpp`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from peftkit.engine.compiled import OFTEN, SEEDS, library
from peftkit.engine.unpadded import Unpadded

LANES = 16
"""Numbers that the compiled code takes at once."""
WIDEST = 128
"""Numbers of a head up to which it keeps results in registers."""
LONGEST = 512
"""Tokens of an example up to which the compiled code is faster without dropout, too."""


class _Place(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Call(ctypes.Structure):
    """`struct Call` of the compiled code."""

    _fields_ = (
        *((name, _Place) for name in ("query", "key", "value", "output")),
        ("logarithm", ctypes.c_void_p),
        *((f"{name}_gradient", _Place) for name in ("output", "query", "key", "value")),
        ("starts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("examples", "heads", "key_heads", "width", "tokens")),
        ("scale", ctypes.c_float),
        ("kept", ctypes.c_float),
        ("drop", ctypes.c_uint32),
        ("causal", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
    )


def attend_in_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q Kᵀ · scale) V of each example by itself, with dropout of the weights.

    Args:
        query: (tokens, heads, width), float32 or bfloat16, on a CPU; `key` and `value` may have fewer heads, each of
            which several heads of queries share.
        lengths: tokens of the examples, in the order in which they stand in the row; tokens behind them are not looked
            at, and get 0.
        causal: a token sees none that come after it.
        scale: default: 1/√width.
        dropout: probability up to 0.99, of each weight by itself; drawn from torch's global generator.

    Returns:
        (tokens, heads, width)
    """
    seed = int(torch.randint(SEEDS, ())) if dropout else 0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _InRow.apply(query, key, value, list(lengths), causal, scale, dropout, seed)
    return output


def in_row(
    row: Unpadded, query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout: float, scaling: float | None
) -> Tensor | None:
    """(1, places of the row, heads, width); None where there is no compiled code, or no gain in it.

    Args:
        query: (1, heads, places of the row, width), and so `key` and `value`.
    """
    if not suits(query, dropout) or not (dropout or row.lengths[0] <= LONGEST):
        return None
    # not [0], whose gradient is written into zeros
    queries, keys, values = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    return attend_in_row(queries, keys, values, row.lengths, causal, scaling, dropout)[None]


def suits(query: Tensor, dropout: float) -> bool:
    """Whether there is compiled code for such queries (…, width)."""
    known = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
    return known and query.shape[-1] <= WIDEST and dropout <= OFTEN


class _InRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        output, logarithm = torch.ops.peftkit.attend_in_row(query, key, value, *how)
        ctx.save_for_backward(query, key, value, output, logarithm)
        ctx.how = how
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found = torch.ops.peftkit.attend_in_row_backward(gradient, *ctx.saved_tensors, *ctx.how)
        return (*found, *[None] * len(ctx.how))


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    causal: bool,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """What attention gives, and the logarithm of what each query's softmax divides by, (heads, tokens)."""
    query, key, value = map(_in_order, (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype)
    logarithm = torch.empty(query.shape[1], query.shape[0])
    _blank(lengths, output)
    _run(query, key, value, output, logarithm, (lengths, causal, scale, dropout, seed))
    return output, logarithm


def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logarithm: Tensor,
    lengths: list[int],
    causal: bool,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, query, key, value = map(_in_order, (gradient, query, key, value))
    found = tuple(torch.empty(one.shape, dtype=one.dtype) for one in (query, key, value))
    _blank(lengths, *found)
    _run(query, key, value, output, logarithm, (lengths, causal, scale, dropout, seed), gradient, *found)
    return found[0], found[1], found[2]


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logarithm: Tensor,
    how: tuple[list[int], bool, float, float, int],
    *gradients: Tensor,
) -> None:
    """Forward into `output` and `logarithm`; backward, with the gradients of output, query, key and value."""
    lengths, causal, scale, dropout, seed = how
    tokens, heads, width = query.shape
    starts = (ctypes.c_int64 * (len(lengths) + 1))(0, *accumulate(lengths))
    call = _Call(
        *map(_place, (query, key, value, output)),
        logarithm.data_ptr(),
        *(map(_place, gradients) if gradients else [_Place()] * 4),
        ctypes.addressof(starts),
        len(lengths),
        heads,
        key.shape[1],
        width,
        tokens,
        scale,
        1 / (1 - dropout),
        round(dropout * 2**32),
        causal,
        torch.get_num_threads(),
        seed,
    )
    parts = -(-width // LANES)
    functions = library("attention", HALF=int(query.dtype == torch.bfloat16), PARTS=parts)
    functions.attend(ctypes.byref(call), int(bool(gradients)))


def _in_order(rows: Tensor) -> Tensor:
    """With the numbers of a head side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _place(rows: Tensor) -> _Place:
    return _Place(rows.data_ptr(), rows.stride(0), rows.stride(1))


def _blank(lengths: list[int], *rows: Tensor) -> None:
    """What no example writes to."""
    taken = sum(lengths)
    for one in rows:
        if taken < len(one):
            one[taken:] = 0


HOW = "int[] lengths, bool causal, float scale, float dropout, int seed"
LIBRARY = torch.library.Library("peftkit", "FRAGMENT")
"""What runs on tensors without values too, so that a plan goes the way of the run."""
LIBRARY.define(f"attend_in_row(Tensor query, Tensor key, Tensor value, {HOW}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attend_in_row_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logarithm, "
    f"{HOW}) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attend_in_row", _attended, "CPU")
LIBRARY.impl("attend_in_row_backward", _gradients, "CPU")


@torch.library.register_fake("peftkit::attend_in_row", lib=LIBRARY)
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logarithm = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), logarithm


@torch.library.register_fake("peftkit::attend_in_row_backward", lib=LIBRARY)
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@register_flop_formula(torch.ops.peftkit.attend_in_row)
def _(query: Any, key: Any, value: Any, lengths: list[int], *_: Any, **__: Any) -> int:
    """Two products of each query with each key of its example."""
    return 2 * 2 * query[1] * query[2] * sum(one**2 for one in lengths)


@register_flop_formula(torch.ops.peftkit.attend_in_row_backward)
def _(gradient: Any, query: Any, key: Any, value: Any, output: Any, logarithm: Any, *how: Any, **_: Any) -> int:
    """Five, of which the first makes the scores again."""
    lengths: list[int] = how[0]
    return 5 * 2 * query[1] * query[2] * sum(one**2 for one in lengths)
