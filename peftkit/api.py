"""Methods on a model that the caller loaded, for training loops of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import wrap
from peftkit.errors import MethodError
from peftkit.methods.base import Method, numel, trained_parameters

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
    if hasattr(model, "peft_config") or hasattr(model, "adapted_by"):
        raise MethodError("this model has an adapter already; attach to a model as transformers loads it")
    if method.start_from is not None:
        raise MethodError("start_from is for runs, which know the backbone's weights; load that run and train it on")
    before = len(list(model.parameters()))
    attached: Any = method.attach(wrap(model), total_steps)
    if len(list(attached.parameters())) > before:
        attached.adapted_by = method.kind  # methods that add nothing, such as the head alone, may be followed by others
    adapted: nn.Module = attached
    return adapted


def split_fused(model: nn.Module, targets: str) -> nn.Module:
    """Make the fused projections that `targets` names in part separate linear layers, in place.

    An adapter on a part, such as the query inside GPT-2's `c_attn`, names modules that only such a model has: call
    this with the same targets before plain `PeftModel.from_pretrained`.

    Raises:
        BackboneError: an architecture without a layout.
        MethodError: a target that matches nothing, or a projection that is not plain.
    """
    from peftkit.backbones.fused import split_fused as split
    from peftkit.backbones.targets import find_targets

    layout = wrap(model).layout
    split(model, layout, find_targets(model, layout, targets))
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters of `model` train, exactly."""
    return sum(map(numel, trained_parameters(model).values()))
