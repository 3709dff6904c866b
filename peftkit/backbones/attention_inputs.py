"""What a module attends with, and what may change it on the way: queries, keys, values and mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Attention(NamedTuple):
    """What an attention function is given."""

    query: Tensor
    """(batch, heads, queries, width)"""
    key: Tensor
    """(batch, key heads, keys, width); those from the cache first."""
    value: Tensor
    mask: Tensor | None
    """Broadcast to (batch, heads, queries, keys): true where a query sees a key, or what is added to the scores."""
    position_bias: Tensor | None
    """(1, heads, queries, keys), also added to the scores; T5's."""
    causal: bool
    """There is no mask, because the function hides the future by itself."""

    def prepended(self, key: Tensor, value: Tensor) -> Attention:
        """With more keys and values, (batch, key heads, n, width), before the others, for every query to see.

        No position bias holds for them.
        """
        extra, keys, mask = key.shape[2], self.key.shape[2], self._mask()
        if mask is not None:
            seen = True if mask.dtype == torch.bool else 0.0
            mask = pad(mask.expand(*mask.shape[:-1], keys), (extra, 0), value=seen)
        return Attention(
            self.query,
            torch.cat([key, self.key], dim=2),
            torch.cat([value, self.value], dim=2),
            mask,
            None if self.position_bias is None else pad(self.position_bias, (extra, 0)),
            causal=False,
        )

    def _mask(self) -> Tensor | None:
        """The mask, written out where the function would have made its own."""
        if not self.causal:
            return self.mask
        # aligned at the first key: keys beyond the queries are the empty places of a static cache
        whole = self.query.new_ones(self.query.shape[2], self.key.shape[2], dtype=torch.bool)
        return whole.tril()[None, None]


class BeforeAttention(nn.Module):
    """A child of an attention module through which everything goes that the module attends with."""

    def forward(self, attention: Attention) -> Attention:
        raise NotImplementedError


def changed(module: nn.Module, attention: Attention) -> Attention:
    """What `module` is to attend with, after its `BeforeAttention` children."""
    for child in module.children():
        if isinstance(child, BeforeAttention):
            attention = child(attention)
    return attention


def is_plain(module: nn.Module) -> bool:
    """Whether nothing changes what `module` attends with."""
    return not any(isinstance(child, BeforeAttention) for child in module.children())
