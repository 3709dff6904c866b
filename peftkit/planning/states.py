"""What optimizers keep from step to step, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 4096
"""Numbers below which bitsandbytes keeps a parameter's moments in float32."""
BLOCK = 256
"""Numbers that share one scale in its 8-bit moments."""
CODES = 2 * 256 * 4
"""Its two tables of what the 256 codes stand for, which every 8-bit parameter has."""
COUNTER = 4
"""The number of steps that torch's AdamW keeps beside every parameter, in float32."""


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """The state of `training.optimizer` after its first step over `parameters`."""
    return sum(map(OF_ONE[name], parameters))


def _adamw(parameter: Tensor) -> int:
    return 2 * parameter.nbytes + COUNTER


def _momentum(parameter: Tensor) -> int:
    return parameter.nbytes


def _adafactor(parameter: Tensor) -> int:
    """The second moment of a matrix by its rows and columns alone (Shazeer & Stern 2018), in float32, and the root mean
    square of the parameter."""
    shape = parameter.shape
    if len(shape) < 2:
        return 4 * parameter.numel() + 4
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]) + 4


def _eight_bit(parameter: Tensor) -> int:
    count = parameter.numel()
    if count < SMALL:
        return 8 * count
    return 2 * (count + 4 * -(-count // BLOCK)) + CODES


OF_ONE = {
    "adamw": _adamw,
    "paged_adamw": _adamw,  # the same moments, which may leave a GPU's memory when that is short
    "sgd": _momentum,
    "adafactor": _adafactor,
    "adamw_8bit": _eight_bit,
}
"""By `training.optimizer`: what it keeps of one parameter."""
