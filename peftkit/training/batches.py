"""Which examples every process sees in every optimizer step: a function of seed, epoch and step alone.

The global batch of a step does not depend on the number of processes, on `micro_batch_size` or on `micro_batch_tokens`;
those only decide how it is cut. Every process gets equally many micro-batches, so that collective operations match;
where there are not enough examples, a process repeats one with weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

POOL = 50
"""Batches whose examples are sorted by length together, when batches are grouped by length."""


@dataclass(frozen=True)
class MicroBatch:
    """Example indices of one forward pass; `counted` is False for a repeated example that must not count."""

    indices: tuple[int, ...]
    counted: bool = True


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Global batches of one epoch, each example once; only one batch may be smaller than `batch_size`."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    if group_by_length:
        pool = POOL * batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = [index for one in pools for index in sorted(one, key=lambda index: -lengths[index])]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if group_by_length:
        batches = [batches[position] for position in generator.permutation(len(batches))]
    return batches


def steps(
    lengths: Sequence[int], batch_size: int, seed: int, group_by_length: bool, start: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, global batch) of step `start`, `start` + 1, … without end."""
    per_epoch = -(-len(lengths) // batch_size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        for batch in epoch_batches(lengths, batch_size, seed, epoch, group_by_length)[skip:]:
            yield epoch, batch
        epoch, skip = epoch + 1, 0


def micro_batches(
    batch: Sequence[int],
    lengths: Sequence[int],
    micro_batch_size: int | None,
    processes: int,
    rank: int,
    micro_batch_tokens: int | None = None,
) -> list[MicroBatch]:
    """This process's part of a global batch, cut so that examples of similar length go together.

    Args:
        lengths: of all examples of train, in tokens.
        micro_batch_size: most examples of a part.
        micro_batch_tokens: most tokens of a part, if all its examples were as long as its longest; what is longer by
            itself goes alone.
    """
    size = min(micro_batch_size or len(batch), -(-len(batch) // processes))
    order = sorted(batch, key=lambda index: -lengths[index])
    parts, start = [], 0
    while start < len(order):
        room = size if micro_batch_tokens is None else micro_batch_tokens // max(1, lengths[order[start]])
        end = start + max(1, min(size, room))
        parts.append(MicroBatch(tuple(order[start:end])))
        start = end
    while len(parts) % processes:
        parts.append(MicroBatch((order[-1],), counted=False))
    return parts[rank::processes]
