"""What a model's outputs stand for, and what follows from it for two or more sets of them: how far they are apart, and
what they say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Outputs = Literal["classes", "marks", "number"]
"""`classes`: logits of a softmax; `marks`: each a logit of a yes or no by itself; `number`: the answer itself."""


def divergences(outputs: Outputs, one: Tensor, other: Tensor) -> Tensor:
    """½ (KL(p ‖ q) + KL(q ‖ p)) of each item, shape (items,), for two float logits (items, outputs).

    Marks: the mean over the outputs, as their loss takes it. Numbers: (a − b)², which is to squared error what the
    divergence of two normal distributions is to their log-likelihood.
    """
    if outputs == "number":
        return (one - other).square().flatten(1).mean(1) if one.ndim > 1 else (one - other).square()
    if outputs == "marks":
        # logit p − logit q is exact where 1 − p rounds to 1
        return ((one.sigmoid() - other.sigmoid()) * (one - other)).mean(-1) / 2
    ratio = one.log_softmax(-1) - other.log_softmax(-1)
    return ((one.softmax(-1) - other.softmax(-1)) * ratio).sum(-1) / 2


def together(outputs: Outputs, logits: Sequence[Tensor]) -> Tensor:
    """The logits of the mean of several models' probabilities, or the mean of their numbers."""
    import torch
    from torch.nn.functional import logsigmoid

    stacked = torch.stack([one.float() for one in logits])
    if outputs == "number":
        return stacked.mean(0)
    if outputs == "marks":
        return _log_of_mean(logsigmoid(stacked)) - _log_of_mean(logsigmoid(-stacked))
    return _log_of_mean(stacked.log_softmax(-1))


def _log_of_mean(logs: Tensor) -> Tensor:
    return logs.logsumexp(0) - math.log(len(logs))
