"""Evaluation of a model that processes hold shares of, where each may run other forward passes than the others.

To gather a block, all processes must take part, but they have different numbers of batches and write texts of different
lengths. So before a block computes, its process asks for it; all agree on the first block that anybody asks for, put
it together, and the one that asked goes on. Who has nothing left to compute keeps answering until nobody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from peftkit.errors import TrainingError
from peftkit.training.sharding import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

FAILED = -1
"""What a process asks for that cannot go on; less than the number of any block."""


@contextlib.contextmanager
def on_request(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """Let each process run what forward passes it likes without gradients; for all of them to enter.

    Raises:
        TrainingError: another process failed.
    """
    if not is_sharded(model):
        yield
        return
    requests = _Requests(model, accelerator)
    # what is outside the blocks is used by every pass, and stays together meanwhile
    model.set_reshard_after_forward(True)
    model.set_reshard_after_forward(False, recurse=False)
    model.unshard()
    handles = [
        block.register_forward_pre_hook(partial(_ask, requests, number), prepend=True)
        for number, block in enumerate(requests.blocks)
    ]
    try:
        yield
        requests.ask(len(requests.blocks))
    except _OtherFailed:
        raise TrainingError("another process failed while this one was evaluating; its own message says why") from None
    except Exception:
        requests.agree(FAILED)
        raise
    finally:
        for handle in handles:
            handle.remove()
        model.set_reshard_after_forward(accelerator.sharding.reshard_after_forward)
        model.reshard()


class _OtherFailed(Exception):
    """Another process cannot go on."""


class _Requests:
    """The blocks of a model by number, and the words of this process in the talk about them."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.blocks: list[Any] = [
            part for part in model.modules() if isinstance(part, FSDPModule) and part is not model
        ]
        self.device = accelerator.device

    def ask(self, number: int) -> None:
        """Take part in gathering blocks until the one of this number, or nothing, is due."""
        while (due := self.agree(number)) != number:
            self.blocks[due].unshard()
            self.blocks[due].reshard()

    def agree(self, number: int) -> int:
        """The least number that a process asks for."""
        import torch
        from torch.distributed import ReduceOp, all_reduce

        asked = torch.tensor(number, device=self.device)
        all_reduce(asked, ReduceOp.MIN)
        due = int(asked)
        if due == FAILED != number:
            raise _OtherFailed
        return due


def _ask(requests: _Requests, number: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
    requests.ask(number)
