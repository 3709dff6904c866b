"""What a training did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    losses: tuple[float, ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()
    changes: tuple[dict[str, Any], ...] = ()
    """What was allowed to change when the run was continued: `step`, `name`, `before`, `after`."""
