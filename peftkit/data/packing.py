"""Several examples in one sequence, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch stand once they share sequences."""

    shape: tuple[int, int]
    """(sequences, tokens)"""
    places: Tensor
    """(examples, tokens): the place of each token in the flattened sequences; padding has none, and says 0."""
    position_ids: Tensor
    """As `shape`, from 0 in every example, which is how transformers tells examples apart. What fills a sequence up
    starts anew with every token, so it is a part of no example."""

    def packed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids of the padded batch in this layout; `mask` is true of real tokens, and the rest is 0."""
        flat = ids.new_zeros(self.shape[0] * self.shape[1])
        flat[self.places[mask]] = ids[mask]
        return flat.view(self.shape)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins: from the longest on, each into the first bin with room (Johnson 1973).

    Args:
        capacity: of each bin; what is longer has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        found = next((at for at, left in enumerate(room) if left >= lengths[index]), None)
        if found is None:
            found = len(bins)
            bins.append([])
            room.append(capacity)
        bins[found].append(index)
        room[found] -= lengths[index]
    return bins


def lay_out(mask: Tensor, capacity: int) -> Layout:
    """Share sequences of at most `capacity` tokens among the examples of a batch that is padded on the right.

    Args:
        mask: (examples, tokens), 1 where a token is real.
    """
    import torch

    lengths = mask.sum(1).tolist()
    bins = first_fit_decreasing(lengths, capacity)
    width = max(sum(lengths[index] for index in one) for one in bins)
    starts = [0] * len(lengths)
    for number, one in enumerate(bins):
        start = number * width
        for index in one:
            starts[index] = start
            start += lengths[index]
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    places = (torch.tensor(starts, device=mask.device)[:, None] + positions) * mask
    position_ids = positions.new_zeros(len(bins) * width)
    real = mask.bool()
    position_ids[places[real]] = positions[real]
    return Layout((len(bins), width), places, position_ids.view(len(bins), width))
