"""Dropout by compiled code, whose masks nobody keeps: which numbers fall is told by their places and a seed
(`compiled/dropout.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from peftkit.engine.compiled import OFTEN, SEEDS, library

Pointer, Long = ctypes.c_void_p, ctypes.c_int64
TYPES = (Pointer, Pointer, Long, Long, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int32, ctypes.c_int32)


def suits(values: Tensor, probability: float) -> bool:
    """Whether there is compiled code for such values."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16) and probability <= OFTEN


def seed_for(values: Tensor, probability: float) -> Tensor:
    """(2): a seed from torch's global generator, and the chance to fall in 2³²."""
    words = values.new_empty(2, dtype=torch.int64).random_(SEEDS)
    words[1] = round(probability * 2**32)
    return words


def dropped(values: Tensor, seed: Tensor, scale: float = 1.0) -> Tensor:
    """`values`, each times `scale` or 0."""
    found: Tensor = torch.ops.peftkit.drop(values, seed, scale)
    return found


def add_dropped(total: Tensor, values: Tensor, seed: Tensor, first: int) -> None:
    """Add to `total` what of `values` does not fall, in place; the first of them stands at place `first`."""
    torch.ops.peftkit.add_dropped_(total, values, seed, first)


def _drop(values: Tensor, seed: Tensor, scale: float) -> Tensor:
    values = values.contiguous()
    found = torch.empty_like(values)
    _run(values, found, seed, scale, 0, False)
    return found


def _add_dropped(total: Tensor, values: Tensor, seed: Tensor, first: int) -> None:
    assert total.is_contiguous()
    _run(values.contiguous(), total, seed, 1.0, first, True)


def _run(values: Tensor, to: Tensor, seed: Tensor, scale: float, first: int, adds: bool) -> None:
    word, drop = seed.tolist()
    threads, function = torch.get_num_threads(), _compiled(values.dtype == torch.bfloat16)
    function(values.data_ptr(), to.data_ptr(), first, values.numel(), word, drop, scale, adds, threads)


@functools.cache
def _compiled(is_half: bool) -> Any:
    function = library("dropout", HALF=int(is_half)).drop
    function.argtypes = TYPES
    return function


LIBRARY = torch.library.Library("peftkit", "FRAGMENT")
"""What runs on tensors without values too, so that a plan goes the way of the run."""
LIBRARY.define("drop(Tensor values, Tensor seed, float scale) -> Tensor")
LIBRARY.define("add_dropped_(Tensor(a!) total, Tensor values, Tensor seed, int first) -> ()")
LIBRARY.impl("drop", _drop, "CPU")
LIBRARY.impl("add_dropped_", _add_dropped, "CPU")


@torch.library.register_fake("peftkit::drop", lib=LIBRARY)
def _(values: Tensor, *_: object) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("peftkit::add_dropped_", lib=LIBRARY)
def _(*_: object) -> None:
    return None
