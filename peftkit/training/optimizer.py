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


def check_optimizer(name: str, device_type: str) -> None:
    """Refuse an optimizer that this device has not.

    Raises:
        UsageError: an 8-bit optimizer on a device that bitsandbytes has none for.
    """
    if name == "adamw_8bit" and device_type == "cpu":
        raise UsageError("training.optimizer: adamw_8bit needs a GPU that bitsandbytes supports; use adamw here")


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    """The optimizer over what trains. Biases and normalisation weights (everything with one dimension) do not decay."""
    groups = parameter_groups(model, settings.weight_decay)
    rate: Any = {"lr": settings.learning_rate}
    if settings.optimizer == "adamw":
        from torch.optim import AdamW

        return AdamW(groups, **rate)
    if settings.optimizer == "sgd":
        from torch.optim import SGD

        return SGD(groups, momentum=0.9, **rate)
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # steps in proportion to the parameter, torch's only kind, would leave what starts at zero (LoRA's B) there
        return Adafactor(groups, scale_parameter=False, relative_step=False, **rate)
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, **rate)
    return optimizer


def make_schedule(optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> LRScheduler:
    """Warm-up from 0, then decay to 0 at `total_steps` (constant: no decay)."""
    from transformers import get_scheduler

    warmup = settings.warmup(total_steps)
    if warmup >= total_steps:
        raise UsageError(
            f"training.warmup_steps: the warm-up takes {warmup:,} of {total_steps:,} steps, so the learning rate never "
            "gets to its value; lower it"
        )
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    schedule: LRScheduler = get_scheduler(name, optimizer, warmup, total_steps)
    return schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors, which do not."""
    parameters = trained_parameters(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
