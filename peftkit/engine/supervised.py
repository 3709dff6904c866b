"""The loss of a language model where it has labels, without ever holding the logits of all of them.

Logits of some positions at a time become losses and, in the forward pass already, the gradients by what the output
projection was given. The backward pass scales those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from peftkit.backbones.modules import architecture
from peftkit.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.engine.summed_losses import Losses

ENGAGED = "supervised_only"
"""The attribute of an output projection whose logits need not be formed; true once it was seen to end the model."""
BEHIND = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
"""Settings of what models do with their logits, and the values that leave them as they are."""
ROUNDING = 0.05


@contextlib.contextmanager
def supervised_only(model: nn.Module) -> Iterator[None]:
    """`model` with an output projection that losses are taken from in parts, where that is its last step."""
    projection: Any = None if why_not(model) else _projection(model)
    if projection is None or hasattr(projection, ENGAGED):
        yield
        return
    setattr(projection, ENGAGED, False)
    try:
        yield
    finally:
        delattr(projection, ENGAGED)


def why_not(model: nn.Module) -> str:
    """Why the logits of a language model must be formed; empty where they need not, or where there are none."""
    from torch import nn
    from torch.distributed.fsdp import FSDPModule

    owner: Any = _transformer(model)
    projection, name = _projection(model), architecture(owner)
    if projection is None:
        return ""
    if isinstance(model, FSDPModule):
        return f"processes hold shares of the output of {name}"
    if type(projection) is not nn.Linear:
        return f"the output of {name} is not a plain linear layer"
    if projection._forward_hooks or projection._forward_pre_hooks:
        return f"something was added to the output of {name}"
    changed = [key for key, idle in BEHIND.items() if getattr(owner.config, key, idle) not in (idle, None)]
    if changed or hasattr(owner, "final_logits_bias"):
        return f"{name} changes its logits after the output projection ({', '.join(changed) or 'final_logits_bias'})"
    return ""


def engaged_head(model: Any) -> nn.Linear | None:
    """The output projection that losses are taken from in parts; None where they are not."""
    projection: Any = _projection(model)
    return projection if hasattr(projection, ENGAGED) else None


def sample(projection: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is still to go through the model of the `rows` (items, width) whose losses were taken, one at first and
    none once that was as it should be; and its logits."""
    import torch
    from torch.nn.functional import linear

    kept = rows[:0] if getattr(projection, ENGAGED) else rows[:1]
    with torch.no_grad():
        return kept, linear(kept, projection.weight, projection.bias)


def check_last(model: nn.Module, projection: Any, expected: Tensor, logits: Tensor) -> None:
    """Make sure that the model's `logits` are the `expected` ones of its output projection.

    Raises:
        TrainingError: something else follows it.
    """
    import torch

    if not len(expected):
        return
    own, found = expected.flatten().float(), logits.detach().flatten().float()
    # a plan goes through shapes that pass for tensors, and have no values to compare
    if type(own) is torch.Tensor and not (own - found).abs().max() <= ROUNDING * own.abs().max():
        raise TrainingError(
            f"the logits of {architecture(_transformer(model))} are not what its output projection gives, so the loss "
            "cannot be taken from there; set engine.supervised_loss: false"
        )
    setattr(projection, ENGAGED, True)


def summed_losses(projection: nn.Linear, rows: Tensor, labels: Tensor, losses: Losses) -> Tensor:
    """Σ loss, a scalar, of the logits that `projection` makes of `rows` (items, width)."""
    from peftkit.engine.summed_losses import SummedLosses

    found: Tensor = SummedLosses.apply(rows, projection.weight, projection.bias, labels, losses)
    return found


def for_chunks(projection: nn.Linear, rows: Tensor, labels: Tensor, use: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """What `use` makes of float32 logits and labels, some items at a time, without gradients."""
    import torch
    from torch.nn.functional import linear

    from peftkit.engine.summed_losses import items_at_once

    size, weight, bias = items_at_once(projection.out_features), projection.weight, projection.bias
    with torch.no_grad():
        parts = zip(rows.split(size), labels.split(size), strict=True)
        return [use(linear(one, weight, bias).float(), own) for one, own in parts]


def _projection(model: nn.Module) -> nn.Module | None:
    """The output projection, or None where the model has none that is a module."""
    owner: Any = _transformer(model)
    found: nn.Module | None = owner.get_output_embeddings()
    return found


def _transformer(model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    return next(part for part in model.modules() if isinstance(part, PreTrainedModel))
