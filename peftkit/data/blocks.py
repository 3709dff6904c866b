"""Running text in blocks of equal length, and masks for masked language models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.data.collate import IGNORED

KEPT_MASKED, KEPT_RANDOM = 0.8, 0.9  # up to there [MASK], up to there any token, then the token itself


@dataclass(frozen=True)
class Block:
    """Tokens that go through the model together, and the rows that they are from."""

    ids: list[int]
    rows: list[list[int]]
    """[row, first token, one past its last token] of each row that has tokens here, in order."""


def blocks(texts: Sequence[Sequence[int]], size: int, joined: bool) -> Iterator[Block]:
    """Cut token ids into blocks of at most `size`; no token is left out.

    Args:
        joined: blocks go on with the next text where one ends; otherwise every text begins a block.
    """
    block = Block([], [])
    for row, ids in enumerate(texts):
        done = 0
        while done < len(ids):
            part = ids[done : done + size - len(block.ids)]
            block.rows.append([row, len(block.ids), len(block.ids) + len(part)])
            block.ids.extend(part)
            done += len(part)
            if len(block.ids) == size:
                yield block
                block = Block([], [])
        if block.ids and not joined:
            yield block
            block = Block([], [])
    if block.ids:
        yield block


def masked(
    ids: Sequence[int], maskable: Sequence[int], mask: int, vocabulary: int, share: float, seed: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(token ids, labels) with round(`share` · maskable tokens), at least one, to be predicted: 80 % of them become
    `mask`, 10 % any token, 10 % stay (Devlin et al. 2019, section 3.1).

    A function of its arguments alone; how many are chosen depends on neither `seed` nor the tokens.

    Args:
        maskable: positions that may be chosen.
        mask: the id of the mask token.
        vocabulary: ids go from 0 up to this, exclusive.
    """
    import numpy as np

    generator = np.random.default_rng([*seed, zlib.crc32(repr(list(ids)).encode())])
    count = min(len(maskable), max(1, round(share * len(maskable))))
    chosen = sorted(generator.choice(maskable, size=count, replace=False).tolist()) if count else []
    given, labels = list(ids), [IGNORED] * len(ids)
    for position in chosen:
        labels[position] = ids[position]
        fate = generator.random()
        if fate < KEPT_MASKED:
            given[position] = mask
        elif fate < KEPT_RANDOM:
            given[position] = int(generator.integers(vocabulary))
    return given, labels
