"""What of a forward pass is kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    # transformers 5.23 renamed it
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # only reentrant checkpoints need inputs with gradients, which everything below the lowest adapter would get too
    changed: Any = model
    changed.disable_input_require_grads()
