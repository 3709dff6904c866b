"""Optimizers and schedules by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.config import TrainingSettings
from peftkit.errors import UsageError
from peftkit.methods.base import trained_parameters

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def make_optimizer(model: nn.Module, settings: TrainingSettings, device_type: str) -> Optimizer:
    """The optimizer over what trains. Biases and normalisation weights (everything with one dimension) do not decay.

    Raises:
        UsageError: an 8-bit optimizer on a device bitsandbytes has none for.
    """
    groups = parameter_groups(model, settings.weight_decay)
    rate: Any = {"lr": settings.learning_rate}
    if settings.optimizer == "adamw":
        from torch.optim import AdamW

        return AdamW(groups, **rate)
    if settings.optimizer == "sgd":
        from torch.optim import SGD

        return SGD(groups, momentum=0.9, **rate)
    if settings.optimizer == "adafactor":
        from torch.optim import Adafactor

        return Adafactor(groups, **rate)
    return _eight_bit(groups, settings, device_type)


def make_schedule(optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> LRScheduler:
    """Warm-up from 0, then decay to 0 at `total_steps` (constant: no decay)."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    schedule: LRScheduler = get_scheduler(name, optimizer, settings.warmup(total_steps), total_steps)
    return schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors, which do not."""
    parameters = trained_parameters(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _eight_bit(groups: list[dict[str, Any]], settings: TrainingSettings, device_type: str) -> Optimizer:
    if device_type == "cpu":
        raise UsageError("training.optimizer: adamw_8bit needs a GPU that bitsandbytes supports; use adamw here")
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, lr=settings.learning_rate)
    return optimizer
