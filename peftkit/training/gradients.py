"""Gradients of several processes: summed up once in an optimizer step, however many parts its batch is cut into."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from peftkit.methods.base import trained_parameters
from peftkit.training.sharding import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


class Gradients:
    """Averaged by DistributedDataParallel during the last backward pass of a step; with one process, as they are."""

    def __init__(self, wrapped: nn.Module, accelerator: Accelerator) -> None:
        self.wrapped, self.accelerator = wrapped, accelerator

    def part(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of a part of the batch."""
        if last:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(self.wrapped)
        return quiet

    def complete(self) -> None:
        """Called behind the last part, before gradients are used."""
        return


class ShardedGradients(Gradients):
    """Of shares, `fully_shard` averages them and leaves each process its own; of what each process holds whole, the
    average is taken here, in one message for each dtype."""

    def part(self, last: bool) -> contextlib.AbstractContextManager[None]:
        sharded: Any = self.wrapped
        sharded.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def complete(self) -> None:
        from torch.distributed.tensor import DTensor

        by_dtype: dict[Any, list[nn.Parameter]] = {}
        for parameter in trained_parameters(self.wrapped).values():
            if not isinstance(parameter, DTensor):
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            average(parameters, self.accelerator.num_processes)


def average(parameters: list[nn.Parameter], processes: int) -> None:
    """Average the gradients of parameters that every process holds; none where no process has one."""
    import torch
    from torch.distributed import all_reduce

    held = [parameter.grad is not None for parameter in parameters]
    parts: list[Tensor] = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(held)])
    # as DistributedDataParallel does it: divided first, so that no sum overflows
    all_reduce(flat.div_(processes))
    *averages, anywhere = flat.split([*(part.numel() for part in parts), len(parts)])
    for parameter, found, some in zip(parameters, averages, anywhere.tolist(), strict=True):
        parameter.grad = found.view_as(parameter).clone() if some else None


def gradients_of(wrapped: nn.Module, accelerator: Accelerator) -> Gradients:
    """The gradients of a model as it is wrapped for training."""
    return (ShardedGradients if is_sharded(wrapped) else Gradients)(wrapped, accelerator)
