"""Whether a training does what it is for: what should train moves, what is frozen stays, and the loss does not leap."""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING

from peftkit.errors import TrainingError
from peftkit.methods.base import Method, trained_parameters
from peftkit.training.sharding import is_sharded

if TYPE_CHECKING:
    from torch import Tensor, nn

SETTLED = 3
"""Steps with a learning rate after which everything must have moved: LoRA's A has no gradient in the first."""
REMEMBERED, FEWEST = 64, 20
"""Losses that a leap is told by, and how many of them there must be."""
LEAP = 8.0
"""Median absolute deviations above the median, in units of the normal distribution's standard deviation."""
LISTED = 3


class Health:
    """Checks of a model in training; costs two sums over what trains, and one over what does not."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self._model, self._method = model, method
        self._frozen = {name: _checksum(p) for name, p in _frozen(model).items()}
        self._start: dict[str, tuple[float, float]] | None = {
            name: _sums(p) for name, p in trained_parameters(model).items()
        }
        self._steps = 0
        self._losses: deque[float] = deque(maxlen=REMEMBERED)

    def check_gradients(self) -> None:
        """Called behind the first backward pass of a step.

        Raises:
            TrainingError: a parameter that should train has no gradient.
        """
        if self._steps:
            return
        without = [name for name, p in trained_parameters(self._model).items() if p.grad is None]
        if without:
            raise TrainingError(
                f"{_listed(without)} should train and got no gradient: no output that is learnt from depends on it; "
                "leave it out of what trains, or target what the model computes with"
            )

    def after_step(self, learning_rate: float) -> None:
        """Called behind each optimizer step that was taken.

        Raises:
            TrainingError: a parameter that should train stands where it did.
        """
        self._steps += learning_rate > 0
        if self._start is None or self._steps < SETTLED:
            return
        trained, start = trained_parameters(self._model), self._start
        moved = _anywhere([_sums(p) != start[name] for name, p in trained.items()], self._model)
        # attention does not depend on the bias of its keys, so a vector that stands still may be right
        vectors = any(moved)
        still = [
            name
            for (name, p), has_moved in zip(trained.items(), moved, strict=True)
            if not has_moved and not (vectors and p.ndim < 2)
        ]
        still = [name for name in still if not self._method.may_stand_still(name)]
        self._start = None
        if still:
            raise TrainingError(
                f"{_listed(still)} should train and has not changed in {SETTLED} steps: its gradient is zero, or each "
                "step is smaller than its rounding; raise training.learning_rate, hold it in float32, or leave it out"
            )

    def leaps(self, loss: float) -> bool:
        """Whether this loss is far above those before it; it is then not remembered."""
        known = self._losses
        if len(known) >= FEWEST:
            middle = statistics.median(known)
            spread = 1.4826 * statistics.median(abs(one - middle) for one in known)
            if loss > middle + max(LEAP * spread, 0.5 * abs(middle)):
                return True
        known.append(loss)
        return False

    def check_frozen(self) -> None:
        """Called when training has ended.

        Raises:
            TrainingError: a weight that does not train has other bits than before.
        """
        moved = [name for name, p in _frozen(self._model).items() if _checksum(p) != self._frozen.get(name)]
        if moved:
            raise TrainingError(
                f"{_listed(moved)} should be frozen and changed during training, so what was trained does not belong "
                "to the backbone as it is on disk; this is a fault: please report it with `peftkit env`"
            )


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def _own(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    from torch.distributed.tensor import DTensor

    held = parameter.detach()
    return held.to_local() if isinstance(held, DTensor) else held.data


def _anywhere(flags: list[bool], model: nn.Module) -> list[bool]:
    """What is so here, or in any process where they hold shares of the model: only some rows of an embedding move."""
    if not is_sharded(model):
        return flags
    import torch
    from torch.distributed import ReduceOp, all_reduce

    found = torch.tensor(flags, dtype=torch.int32, device=_own(next(model.parameters())).device)
    all_reduce(found, ReduceOp.MAX)
    return [bool(one) for one in found.tolist()]


def _sums(parameter: Tensor) -> tuple[float, float]:
    import torch

    held = _own(parameter)
    return float(held.sum(dtype=torch.float64)), float(held.abs().sum(dtype=torch.float64))


def _checksum(parameter: Tensor) -> int:
    """The sum of the bits, taken as 64-bit numbers that wrap around; any single change shows."""
    import torch

    bits = _own(parameter).contiguous().view(-1).view(torch.uint8)
    whole = len(bits) // 8 * 8
    return int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum()) if len(bits) else 0


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:LISTED]) + more
