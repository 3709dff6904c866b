"""Rows of words that are longer than the model reads at once, as windows that overlap."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.errors import UsageError


@dataclass(frozen=True)
class Window:
    """What goes through the model at once."""

    tokens: Sequence[int]
    """Positions in the row's token ids, special tokens included, ascending."""
    words: range
    """The words whose tags are taken from here. The windows of a row share its words out, in order."""


def windows(word_ids: Sequence[int | None], words: int, max_length: int, stride: int) -> list[Window]:
    """A row as windows of at most `max_length` tokens.

    Every window but the first begins with a word and shares at least `stride` sub-words with the one before it (fewer
    only where a single word fills more than the rest). A word is answered where its first sub-word is farthest from
    both edges; edges of the row itself do not count.

    Args:
        word_ids: the word of each token, None for special tokens, which stand at both ends.
        words: how many words the row has; a word may have no token.

    Raises:
        UsageError: windows of `max_length` that share `stride` sub-words would never end.
    """
    if len(word_ids) <= max_length:
        return [Window(range(len(word_ids)), range(words))]
    body = [position for position, word in enumerate(word_ids) if word is not None]
    room = max_length - (len(word_ids) - len(body))
    if room <= stride:
        raise UsageError(
            f"task.stride is {stride}, but a window of task.max_length {max_length} holds {room} sub-words"
        )
    starts = [at for at, position in enumerate(body) if not at or word_ids[position] != word_ids[body[at - 1]]]
    edges = list(_edges(starts, len(body), room, stride))
    firsts: dict[int, int] = {}
    for start in starts:
        firsts.setdefault(_best_window(edges, start, len(body)), int(word_ids[body[start]] or 0))
    bounds = [0, *list(firsts.values())[1:], words]
    return [
        Window(_with_special(body[slice(*edges[window])], body, len(word_ids)), range(*pair))
        for window, pair in zip(firsts, itertools.pairwise(bounds), strict=True)
    ]


def cut(word_ids: Sequence[int | None], words: int, max_length: int) -> Window:
    """The first `max_length` tokens of a row, special tokens at its end included; all its words are answered here."""
    body = [position for position, word in enumerate(word_ids) if word is not None]
    room = max_length - (len(word_ids) - len(body))
    return Window(_with_special(body[:room], body, len(word_ids)), range(words))


def _with_special(kept: Sequence[int], body: Sequence[int], tokens: int) -> list[int]:
    return [*range(body[0]), *kept, *range(body[-1] + 1, tokens)]


def _edges(starts: Sequence[int], length: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each window among `length` sub-words, of which words begin at `starts`."""
    begin = 0
    while True:
        end = min(begin + room, length)
        yield begin, end
        following = bisect_right(starts, begin)
        if end == length or following == len(starts):
            return
        begin = starts[max(following, bisect_right(starts, end - stride) - 1)]


def _best_window(edges: Sequence[tuple[int, int]], start: int, length: int) -> int:
    """The index of the window in which the sub-word at `start` has most context; the first of several.

    It never falls from one word to the next: both ends of windows ascend.
    """
    return max(range(len(edges)), key=lambda index: _context(edges[index], start, length))


def _context(edge: tuple[int, int], start: int, length: int) -> float:
    """Sub-words to the nearer edge that is not the row's own; −1 outside."""
    begin, end = edge
    if not begin <= start < end:
        return -1
    return min(start - begin if begin else math.inf, end - 1 - start if end < length else math.inf)
