"""The real tokens of a padded batch in one row, and attention over that row, example by example.

Examples stand in the row from the longest to the shortest. Attention takes neighbours of similar length together, in
buckets that are padded to their longest: nothing else of a model sees padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

ALIKE = 0.5
"""An example of at least so much of the length of the longest in a bucket shares it."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries, keys, values (examples, heads, tokens, width), and a mask, to (examples, tokens, heads, width)."""


@dataclass(frozen=True)
class Bucket:
    """Examples that follow each other in the row and attend in one call, each to itself."""

    lengths: tuple[int, ...]
    """Descending."""
    device: torch.device
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def longest(self) -> int:
        """Tokens that each example is padded to."""
        return self.lengths[0]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all are of one length, so that there is no padding."""
        return self.lengths[-1] == self.longest

    @cached_property
    def real(self) -> Tensor:
        """(examples, longest), true of real tokens."""
        sizes = torch.tensor(self.lengths, device=self.device)
        return torch.arange(self.longest, device=self.device) < sizes[:, None]

    @cached_property
    def places(self) -> Tensor:
        """(tokens,): where each token stands in the flattened padded bucket."""
        return self.real.flatten().nonzero().squeeze(1)

    @cached_property
    def sources(self) -> Tensor:
        """(examples · longest,): which token stands at each place; in padding the first one does, and is not seen."""
        sources = torch.zeros(len(self.lengths) * self.longest, dtype=torch.long, device=self.device)
        sources[self.places] = torch.arange(self.tokens, device=self.device)
        return sources

    def padded(self, rows: Tensor) -> Tensor:
        """(tokens, heads, width) as (examples, heads, longest, width)."""
        if not self.is_even:
            rows = _Spread.apply(rows, self.sources, self.places)
        return rows.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def rows(self, padded: Tensor) -> Tensor:
        """(examples, longest, heads, width) as (tokens, heads, width)."""
        flat = padded.flatten(0, 1)
        return flat if self.is_even else _Gathered.apply(flat, self.places)

    def mask(self, causal: bool, additive: bool, dtype: torch.dtype) -> Tensor | None:
        """What hides padding, and to `causal` attention the future; broadcast to (examples, heads, queries, keys).

        Args:
            additive: what is added to scores of `dtype`, with the future in it; else true of what is seen, or None
                where the function is left nothing to hide but the future. No real token sees padding that comes later.
        """
        key = causal, additive, dtype
        if key not in self._masks:
            self._masks[key] = self._made(*key)
        return self._masks[key]

    def _made(self, causal: bool, additive: bool, dtype: torch.dtype) -> Tensor | None:
        if (self.is_even or causal) and not (causal and additive):
            return None
        past = self.real.new_ones(self.longest, self.longest).tril()
        seen = past[None, None] if causal else self.real[:, None, None]
        if not additive:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)


class Unpadded:
    """How the tokens of a batch that is padded on the right stand in one row.

    A row of `even` length has some more places at its end, which nothing sees and nobody reads, so that few lengths
    occur: libraries that compile a product for its very shape then find it made.
    """

    def __init__(self, mask: Tensor, even: bool = False) -> None:
        """`mask` is (examples, tokens), 1 where a token is real; every example has one."""
        lengths: list[int] = mask.sum(1).tolist()
        self.shape = mask.shape
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.lengths = tuple(lengths[index] for index in order)
        rows = torch.tensor(order, device=mask.device)
        every = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        self.places: Tensor = every[rows][mask[rows].bool()]
        """(tokens,): where each token of the row stands in the flattened batch."""
        self.spare = evened(len(self.places)) - len(self.places) if even else 0
        """Places at the end of the row that hold no token of the batch."""
        self.buckets = tuple(Bucket(one, mask.device) for one in bucketed(self.lengths))
        firsts = torch.tensor([0, *self.lengths[:-1]], device=mask.device).cumsum(0)
        self.firsts = torch.empty_like(firsts).index_copy_(0, rows, firsts)
        """(examples,): where each example of the batch begins in the row."""
        self.read: Tensor | None = None
        """Ascending places in the row of what is read at its end; None: all."""

    def keep(self, read: Tensor) -> None:
        """Let only what `read` (examples, tokens) is true of be there at the end."""
        self.read = read.flatten()[self.places].nonzero().squeeze(1)

    def row(self, batch: Tensor) -> Tensor:
        """(examples, tokens, …) as (1, places of the row, …)."""
        places = torch.cat([self.places, self.places.new_zeros(self.spare)]) if self.spare else self.places
        return batch.flatten(0, 1).index_select(0, places)[None]

    def batch(self, row: Tensor) -> Tensor:
        """(1, places of the row, …) or what is read of them as (examples, tokens, …), with 0 in all other places."""
        places = self.places if self.read is None else self.places[self.read]
        rows = row[0, : len(places)]
        flat = rows.new_zeros(self.shape[0] * self.shape[1], *rows.shape[1:])
        return flat.index_copy(0, places, rows).unflatten(0, self.shape)

    def first(self, row: Tensor) -> Tensor:
        """(1, tokens that are there, …) as (examples, 1, …): the first of each example."""
        at = self.firsts if self.read is None else torch.searchsorted(self.read, self.firsts)
        return row[0].index_select(0, at)[:, None]

    def attended(
        self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, causal: bool, additive: bool
    ) -> Tensor:
        """What `attend` makes of each example by itself: (1, places of the row, heads, width), 0 in spare ones.

        Args:
            query: (1, heads, places of the row, width), and so `key` and `value`.
            additive: the function takes masks that are added to scores, and hides no future by itself.
        """
        sizes = [*(bucket.tokens for bucket in self.buckets), self.spare]
        queries, keys, values = (one.squeeze(0).transpose(0, 1).split(sizes) for one in (query, key, value))
        found = []
        for bucket, *own in zip(self.buckets, queries, keys, values, strict=False):
            mask = bucket.mask(causal, additive, query.dtype)
            q, k, v = map(bucket.padded, own)
            found.append(bucket.rows(attend(q, k, v, mask)))
        if self.spare:
            found.append(found[0].new_zeros(self.spare, *found[0].shape[1:]))
        return torch.cat(found)[None]


def evened(tokens: int) -> int:
    """The next length of which there are 16 to each doubling: at most a sixteenth more."""
    step = max(1, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


def bucketed(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Descending lengths, cut where one is much shorter than the longest before it."""
    buckets: list[list[int]] = []
    for length in lengths:
        if not buckets or length < ALIKE * buckets[-1][0]:
            buckets.append([])
        buckets[-1].append(length)
    return [tuple(one) for one in buckets]


class _Spread(torch.autograd.Function):
    """Rows at the places that `sources` says; each row has one place of its own, and only that one has a gradient."""

    @staticmethod
    def forward(context: Any, rows: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        context.save_for_backward(places)
        return rows.index_select(0, sources)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = context.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Gathered(torch.autograd.Function):
    """The rows at `places`, which differ."""

    @staticmethod
    def forward(context: Any, rows: Tensor, places: Tensor) -> Tensor:
        context.save_for_backward(places)
        context.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,), (gradient,) = context.saved_tensors, gradients
        return gradient.new_zeros(context.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None
