"""What a piece of code holds and moves while it runs: live bytes of tensors, arithmetic, traffic.

The same ledger goes over tensors with values and over those without (`planning/shapes.py`), and finds the same.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten: Any = torch.ops.aten
RANDOM = {aten.native_dropout, aten.bernoulli, aten.bernoulli_, aten.rand_like, aten.randn_like}
FREE = {aten._unsafe_view, aten._reshape_alias, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided}
"""Operations that touch no memory, beside those that torch itself calls views."""


@dataclass(frozen=True)
class Operation:
    """What one call of a kernel costs."""

    dtype: str
    """Of the operands of a matrix product; of the result elsewhere."""
    flops: int
    """Of matrix products, convolutions and attention; 0 elsewhere."""
    bytes: int
    """Read and written."""
    random: int = 0
    """Random numbers that are drawn."""


class Ledger(TorchDispatchMode):
    """Counts within a `with` block. Storages that were there before count from when they are first seen in `hold`.

    Args:
        held: what an allocator takes from the system for a storage of so many bytes; default: those.
    """

    def __init__(self, held: Callable[[int], int] = int) -> None:
        super().__init__()
        self._held = held
        self.live = 0
        """Bytes of the storages that are alive now."""
        self.peak = 0
        """The most that `live` has been."""
        self.operations: Counter[Operation] = Counter()
        self._seen: dict[int, Any] = {}

    def hold(self, tensors: Iterator[Tensor]) -> None:
        """Count storages that are there already, such as those of weights."""
        for tensor in tensors:
            self._count(tensor, int)

    @property
    def flops(self) -> int:
        """All arithmetic that was counted."""
        return sum(one.flops * times for one, times in self.operations.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # questions about a tensor, such as where it is
            return func(*args, **(kwargs or {}))
        result = self.call(func, args, kwargs or {})
        tensors = [one for one in _flat(result) if isinstance(one, Tensor)]
        if tensors:
            for tensor in tensors:
                self._count(tensor, self._held)
            if not func.is_view and func.overloadpacket not in FREE:
                self.operations[_operation(func, args, kwargs or {}, tensors, result)] += 1
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do one operation."""
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor, held: Callable[[int], int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = held(storage.nbytes())

        def gone(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _operation(func: Any, args: Any, kwargs: dict[str, Any], outputs: list[Tensor], result: Any) -> Operation:
    inputs = [one for one in _flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
    packet = func.overloadpacket
    # what a broadcast operand really is, not what it is expanded to
    moved = sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in (*inputs, *outputs))
    flops = _flops(packet, args, kwargs, result)
    dtype = (inputs[-1] if flops and inputs else outputs[0]).dtype
    random = outputs[0].numel() if packet in RANDOM and _draws(packet, args) else 0
    return Operation(str(dtype).removeprefix("torch."), flops, moved, random)


def _draws(packet: Any, args: Any) -> bool:
    return packet is not aten.native_dropout or bool(args[1])


def _flops(packet: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(one.shape for one in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(one.shape for one in args[:4])))
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0
