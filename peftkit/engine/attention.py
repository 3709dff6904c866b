"""Which function attends: torch's own, or the formula or compiled code where those are faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from peftkit.engine.padding_free import attending, pretrained, why_closed

if TYPE_CHECKING:
    from torch import nn

    from peftkit.engine.dropout import Draw

Choice = Literal["auto", "sdpa", "plain"]


@contextlib.contextmanager
def chosen_attention(model: nn.Module, choice: Choice, draw: Draw, compiled: bool = False) -> Iterator[None]:
    """`model` attending as `choice` says where it would attend by torch's function, and afterwards as it did.

    Args:
        draw: the masks of attention's dropout; compiled code has its own.
        compiled: with `auto`, examples in a row attend by compiled code where that is faster.
    """
    from peftkit.backbones.attention import IN_ROW, OWN, close_seam, is_open, open_seam
    from peftkit.engine.plain_attention import PlainAttention
    from peftkit.engine.row_attention import in_row

    base = pretrained(model)
    parts: list[Any] = [] if choice == "sdpa" or why_closed(base) else list(attending(base).values())
    parts = [part for part in parts if not hasattr(part, OWN)]
    closed = [part for part in parts if not is_open(part)]
    try:
        for part in parts:
            open_seam(part)
            setattr(part, OWN, PlainAttention(draw, choice == "plain"))
            if compiled and choice == "auto":
                setattr(part, IN_ROW, in_row)
        yield
    finally:
        for part in parts:
            delattr(part, OWN)
            part.__dict__.pop(IN_ROW, None)
        for part in closed:
            close_seam(part)
