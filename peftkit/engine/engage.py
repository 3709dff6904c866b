"""Puts the techniques into a model for as long as it trains, and takes them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftkit.engine.settings import Engine

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def engaged(model: nn.Module, settings: Engine, device: torch.device) -> Iterator[None]:
    """`model` as it computes with these settings; afterwards it is as it was before."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(shortened(model, settings))
        yield


def fallbacks(model: nn.Module, settings: Engine) -> dict[str, str]:
    """The techniques that `settings` ask for and `model` does without, each with the reason."""
    from peftkit.engine import padding_free, supervised

    reasons = {
        "padding_free": padding_free.why_not(padding_free.pretrained(model)),
        "supervised_loss": supervised.why_not(model),
    }
    return {name: reason for name, reason in reasons.items() if reason and getattr(settings, name)}


@contextlib.contextmanager
def shortened(model: nn.Module, settings: Engine) -> Iterator[None]:
    """`model` without the work that nobody reads, in training and evaluation; what is in it already stays."""
    from peftkit.engine.padding_free import without_padding
    from peftkit.engine.supervised import supervised_only

    with contextlib.ExitStack() as stack:
        if settings.padding_free:
            stack.enter_context(without_padding(model))
        if settings.supervised_loss:
            stack.enter_context(supervised_only(model))
        yield
