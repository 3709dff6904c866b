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
    with contextlib.ExitStack():
        yield
