"""Where a number that is none comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from peftkit.errors import TrainingError
from peftkit.methods.base import trained_parameters
from peftkit.training.sharding import is_sharded

if TYPE_CHECKING:
    from torch import nn

    from peftkit.config import TrainingSettings


LOADED = ", as it was loaded"


def no_number(what: str, value: float, step: int, where: str, settings: TrainingSettings) -> TrainingError:
    """The error of a training whose loss or gradient is NaN or infinite."""
    mend = "lower training.learning_rate" + ("" if settings.precision == "fp32" else " or use precision: fp32")
    if LOADED in where:
        mend = "get the backbone's files again"
    return TrainingError(f"the {what} is {value} at step {step:,}{where and f': {where}'}; {mend}")


def of_loss(model: nn.Module, passes: Iterable[tuple[str, Callable[[], object]]]) -> str:
    """`origin`, over all processes; where they hold shares of the model, it cannot be looked for."""
    from accelerate.utils import gather_object

    found = "" if is_sharded(model) else origin(model, passes)
    return next(filter(None, gather_object([found])), "")


def origin(model: nn.Module, passes: Iterable[tuple[str, Callable[[], object]]]) -> str:
    """In words, what in a model is the first that is NaN or infinite; empty where nothing is.

    Args:
        passes: forward passes to look into, each with the rows that it is of.
    """
    if found := _broken_weight(model):
        return found
    for rows, forward in passes:
        if found := _first_output(model, forward):
            return f"it begins in {found}, for {rows}"
    return ""


def of_gradients(model: nn.Module, again: Callable[[], object]) -> str:
    """A weight that is NaN or infinite, which a loss may hide, or the parameter nearest to the loss whose gradient is:
    backward passes go from there.

    Args:
        again: computes the gradients once more, because clipping by a norm that is none has spoilt all of them.
    """
    if found := _broken_weight(model):
        return found
    model.zero_grad()
    again()
    broken = [name for name, p in trained_parameters(model).items() if p.grad is not None and not _is_finite(p.grad)]
    return f"the gradient of '{broken[-1]}' is the first to be none" if broken else ""


def _broken_weight(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            since = " since the last update" if parameter.requires_grad else LOADED
            return f"the weight '{name}' holds NaN or infinity{since}"
    return ""


def _first_output(model: nn.Module, forward: Callable[[], object]) -> str:
    import torch

    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not all(map(_is_finite, _tensors(output))):
            fed = "of numbers" if all(map(_is_finite, _tensors(inputs))) else "of inputs that were none already"
            found.append(f"'{name}' ({type(module).__name__}), which makes it {fed}")

    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, module, inputs, output)

    handles = [part.register_forward_hook(hook(name)) for name, part in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _is_finite(tensor: Any) -> bool:
    held = tensor.detach()
    return not held.is_floating_point() or hasattr(tensor, "quant_state") or bool(held.isfinite().all())


def _tensors(value: Any) -> Iterable[Any]:
    from torch import is_tensor

    if is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [one for part in value for one in _tensors(part)]
