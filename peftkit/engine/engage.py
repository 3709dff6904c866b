"""Puts the techniques into a model for as long as it trains, and takes them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import layout_for
from peftkit.engine.settings import Engine

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def engaged(model: nn.Module, settings: Engine, device: torch.device) -> Iterator[None]:
    """`model` as it computes with these settings; afterwards it is as it was before."""
    from peftkit.engine.dropout import fast_dropout, keep_mask, plain_mask

    with contextlib.ExitStack() as techniques:
        if settings.fused_lora and hasattr(model, "peft_config"):
            from peftkit.engine.lora_groups import fused_lora

            peft_model: Any = model
            layout = layout_for(peft_model.get_base_model().config.model_type, model)
            draw = keep_mask if settings.fast_dropout else plain_mask
            techniques.enter_context(fused_lora(model, layout, draw))
        if settings.fast_dropout and device.type == "cpu":
            techniques.enter_context(fast_dropout(model))
        yield
