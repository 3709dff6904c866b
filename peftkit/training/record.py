"""What a training did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.methods.base import numel, trained_parameters
from peftkit.training.checkpoint import Progress
from peftkit.training.meter import EXPECTED, Meter, memory_growth_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@dataclass(frozen=True)
class TrainRecord:
    """What training did and what it cost. `seconds` is of training alone, without evaluation."""

    peak_memory_bytes: int
    total_parameters: int
    processes: int
    steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    tokens_per_second: float = 0.0
    trainable_parameters: int = 0
    memory_growth_bytes: int | None = None
    """What of the peak came with the model, its training and evaluation; None where that cannot be told."""
    expected_memory_bytes: int | None = None
    """What `peftkit plan` expects of the same; None where it expects nothing."""
    losses: tuple[float, ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()
    changes: tuple[dict[str, Any], ...] = ()
    """What was allowed to change when the run was continued: `step`, `name`, `before`, `after`."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        accelerator: Accelerator,
        progress: Progress | None = None,
        meter: Meter | None = None,
        keep_best: bool = False,
    ) -> TrainRecord:
        """What became of a model; without progress, of one that nothing was trained in."""
        device = accelerator.device.type
        peak, total = peak_memory_bytes(device), sum(map(numel, model.parameters()))
        if progress is None or meter is None:
            return cls(peak_memory_bytes=peak, total_parameters=total, processes=accelerator.num_processes)
        return cls(
            peak_memory_bytes=peak,
            total_parameters=total,
            processes=accelerator.num_processes,
            steps=progress.step,
            best_step=progress.best_step if keep_best else progress.step,
            seconds=meter.seconds,
            tokens=meter.tokens,
            tokens_per_second=meter.tokens / max(meter.seconds, 1e-9),
            trainable_parameters=sum(map(numel, trained_parameters(model).values())),
            memory_growth_bytes=memory_growth_bytes(model, device),
            expected_memory_bytes=getattr(model, EXPECTED, None),
            losses=tuple(progress.losses),
            evaluations=tuple(progress.evaluations),
            changes=tuple(progress.changes),
        )
