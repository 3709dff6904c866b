"""The size at which a method comes closest to a budget of parameters."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.modules import head_modules
from peftkit.errors import MethodError
from peftkit.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

TRIED_FIRST = 8
"""The smallest size that fits is looked for up to here: some are even, or start above one."""


@dataclass(frozen=True)
class Fit:
    """The method that comes closest to a budget, and why it comes no closer."""

    method: Method
    note: str = ""


def budgeted(method: Method, model: nn.Module) -> int:
    """What a budget is about: the parameters that train without the head, added ones and the backbone's own.

    At the start of training, that is: AdaLoRA's are those of its first rank, P-tuning's those of its network.

    Raises:
        MethodError: the method cannot be on this model.
    """
    config: Any = model.config
    return method.added_parameters(model, layout_for(config.model_type, model)) + method.tuned_parameters(
        model, head_modules(model)
    )


def fit(method: Method, model: nn.Module, budget: int) -> Fit:
    """The method with its `size` set so that it trains as nearly `budget` parameters as it can.

    A method without a size stays as it is. Counts grow with the size, so the search is by bisection; of two sizes that
    are equally near it takes the smaller.

    Raises:
        MethodError: the method cannot be on this model at any size.
    """
    if method.size is None:
        budgeted(method, model)
        return Fit(method, "fixed")
    step = _smallest_step(method, model)

    def cost(multiple: int) -> float:
        return _cost(method, model, step * multiple)

    above = 1
    while cost(above) <= budget:
        above *= 2
    under = bisect_right(range(1, above + 1), float(budget), key=cost)
    near = [multiple for multiple in (under, under + 1) if multiple and math.isfinite(cost(multiple))]
    best = min(near, key=lambda multiple: abs(cost(multiple) - budget))
    note = ""
    if under == 0 and cost(1) > budget:
        note = "smallest"
    elif cost(under) < budget and not math.isfinite(cost(under + 1)):
        note = "largest"
    return Fit(_resized(method, step * best), note)


def _smallest_step(method: Method, model: nn.Module) -> int:
    """The smallest size that can be and whose double can, of which all others are multiples; raises where none can."""
    fitting = [size for size in range(1, TRIED_FIRST + 1) if math.isfinite(_cost(method, model, size))]
    if not fitting:
        try:
            budgeted(_resized(method, 1), model)  # raises what is in the way
        except ValidationError as error:
            raise MethodError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    return next((size for size in fitting if math.isfinite(_cost(method, model, 2 * size))), fitting[0])


def _cost(method: Method, model: nn.Module, size: int) -> float:
    """What is budgeted at a size; infinite where the method or the architecture allows no such size."""
    try:
        return budgeted(_resized(method, size), model)
    except (MethodError, ValidationError):
        return math.inf


def _resized(method: Method, size: int) -> Method:
    return type(method).model_validate(method.model_dump() | {str(method.size): size})
