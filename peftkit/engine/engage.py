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

    from peftkit.engine.dropout import Draw


@contextlib.contextmanager
def engaged(model: nn.Module, settings: Engine, device: torch.device) -> Iterator[None]:
    """`model` as it computes with these settings; afterwards it is as it was before."""
    from peftkit.engine.dropout import fast_dropout

    with contextlib.ExitStack() as techniques:
        techniques.enter_context(shortened(model, settings))
        if settings.fused_lora and hasattr(model, "peft_config"):
            from peftkit.engine.lora_groups import fused_lora

            peft_model: Any = model
            layout = layout_for(peft_model.get_base_model().config.model_type, model)
            techniques.enter_context(fused_lora(model, layout, _draw(settings)))
        if settings.fast_dropout and device.type == "cpu":
            techniques.enter_context(fast_dropout(model, _draw(settings)))
        yield


def fallbacks(model: nn.Module, settings: Engine) -> dict[str, str]:
    """The techniques that `settings` ask for and `model` does without, each with the reason."""
    import torch

    from peftkit.engine import compiled, last_block, padding_free, supervised

    base = padding_free.pretrained(model)
    padded = padding_free.why_not(base)
    reasons = {
        "padding_free": padded,
        "read_positions": "" if padded else last_block.why_whole(base),
        "supervised_loss": supervised.why_not(model),
    }
    found = {name: reason for name, reason in reasons.items() if reason and getattr(settings, name)}
    if not torch.cuda.is_available():
        if settings.padding_free and not padded and not settings.compiled_attention:
            found["compiled_attention"] = compiled.why_not()
        if settings.fast_dropout and not settings.compiled_dropout:
            found["compiled_dropout"] = compiled.why_not()
    return {name: reason for name, reason in found.items() if reason}


def _draw(settings: Engine) -> Draw:
    from peftkit.engine.dropout import drawn_seed, keep_mask, plain_mask

    if not settings.fast_dropout:
        return plain_mask
    return drawn_seed if settings.compiled_dropout is True else keep_mask


@contextlib.contextmanager
def shortened(model: nn.Module, settings: Engine) -> Iterator[None]:
    """`model` without the work that nobody reads, and attending in the fastest way, as in evaluations; what is in it
    already stays."""
    from peftkit.engine.attention import chosen_attention
    from peftkit.engine.last_block import read_only
    from peftkit.engine.padding_free import without_padding
    from peftkit.engine.supervised import supervised_only

    compiled = settings.compiled_attention is True
    with contextlib.ExitStack() as stack:
        stack.enter_context(chosen_attention(model, settings.attention, _draw(settings), compiled))
        if settings.padding_free:
            stack.enter_context(without_padding(model))
            if settings.read_positions:
                stack.enter_context(read_only(model))
        if settings.supervised_loss:
            stack.enter_context(supervised_only(model))
        yield
