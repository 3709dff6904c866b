"""Optimizers and schedules by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.config import TrainingSettings
from peftkit.errors import UsageError
from peftkit.methods.base import Method, trained_parameters

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


def make_optimizer(model: nn.Module, settings: TrainingSettings, method: Method) -> Optimizer:
    """The optimizer over what trains. Biases and normalisation weights (everything with one dimension) do not decay."""
    groups = parameter_groups(model, settings, method)
    rate: Any = {"lr": settings.learning_rate}
    if settings.optimizer == "adamw" or is_unpaged(settings.optimizer):
        from torch.optim import AdamW

        return AdamW(groups, **rate)
    if settings.optimizer == "sgd":
        from torch.optim import SGD

        return SGD(groups, momentum=0.9, **rate)
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # steps in proportion to the parameter, torch's only kind, would leave what starts at zero (LoRA's B) there
        return Adafactor(groups, scale_parameter=False, relative_step=False, **rate)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW32bit

    optimizer: Optimizer = (AdamW8bit if settings.optimizer == "adamw_8bit" else PagedAdamW32bit)(groups, **rate)
    return optimizer


def is_unpaged(name: str) -> bool:
    """Whether `paged_adamw` is AdamW here, because there is no GPU memory to page."""
    import torch

    return name == "paged_adamw" and not torch.cuda.is_available()


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


def parameter_groups(model: nn.Module, settings: TrainingSettings, method: Method) -> list[dict[str, Any]]:
    """A group for each learning rate that the method asks for, apart for matrices, which decay, and vectors."""
    assert settings.learning_rate is not None  # `Run` sees to it
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        groups.setdefault((method.learning_rate_factor(name), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.learning_rate * factor,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (factor, decays), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


class Moments:
    """What an optimizer remembers. Its settings are no part of that: they are those of the run as it is now."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter by its number, and the numbers of each group."""
        whole = self._optimizer.state_dict()
        groups = [{"params": group["params"]} for group in whole["param_groups"]]
        return {"state": whole["state"], "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put it back into an optimizer over the same groups of parameters."""
        own = self._optimizer.state_dict()["param_groups"]
        if [one["params"] for one in own] != [one["params"] for one in saved["param_groups"]]:
            raise UsageError("other parameters share a learning rate than in the checkpoint; set the method as it was")
        self._optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


class Position:
    """Where in a schedule a run is; the rates are those of the run as it is now."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken."""
        return {"step": self._schedule.last_epoch}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Go there, as by as many calls of `step`."""
        schedule, step = self._schedule, saved["step"]
        schedule.last_epoch, schedule._step_count = step, step + 1
        factors = [factor(step) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
