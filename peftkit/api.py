"""Methods on a model that the caller loaded, for training loops of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.backbones.load import wrap
from peftkit.errors import MethodError
from peftkit.methods.base import Method, trained_parameters

if TYPE_CHECKING:
    from torch import nn


def attach(model: nn.Module, method: Method, total_steps: int = 1) -> nn.Module:
    """Put a method on a transformers model; afterwards exactly what it names, and the task's head, trains.

    Args:
        model: any transformers model of a known architecture, with or without a task head. It is changed in place.
        total_steps: optimizer steps of the training to come, for methods with a schedule.

    Raises:
        BackboneError: an architecture without a layout.
        MethodError: a target that matches nothing, or a model that has an adapter already.
    """
    if hasattr(model, "peft_config"):
        raise MethodError("this model has an adapter already; attach to a model as transformers loads it")
    return method.attach(wrap(model), total_steps)


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters of `model` train, exactly."""
    return sum(parameter.numel() for parameter in trained_parameters(model).values())
