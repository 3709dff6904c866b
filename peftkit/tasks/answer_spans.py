"""From the start and end scores of windows to the answers of questions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.data.collate import padded
from peftkit.tasks.base import Batch, Prediction

if TYPE_CHECKING:
    from torch import Tensor

NULL = 0
"""The position that stands for "no answer here": the first, which is [CLS] in BERT."""
SENTENCE = re.compile(r".+?[.!?](?=\s|$)|.+", re.DOTALL)


def context_mask(batch: Batch) -> Tensor:
    """True at the tokens of the context, (examples, tokens), from the `offsets` of a batch."""
    import torch

    inside = [[start >= 0 for start, _ in offsets] for offsets in batch["offsets"]]
    return torch.tensor(padded(inside, False), device=batch["input_ids"].device)


def best_spans(logits: Tensor, inside: Tensor, count: int, longest: int) -> list[list[tuple[float, int, int]]]:
    """(score, first token, last token) of the `count` best spans of each example, best first.

    All spans of at most `longest` tokens are compared, by start logit + end logit.

    Args:
        logits: of start and end, (examples, 2, tokens).
        inside: where spans may be, (examples, tokens).
    """
    from torch.nn.functional import pad

    starts, ends = logits.unbind(1)
    # entry (i, d) of these is about the span from token i to token i + d
    scores = starts[:, :, None] + pad(ends, (0, longest - 1)).unfold(1, longest, 1)
    allowed = inside[:, :, None] & pad(inside, (0, longest - 1)).unfold(1, longest, 1)
    flat = scores.masked_fill(~allowed, -math.inf).flatten(1)
    values, places = flat.topk(min(count, flat.shape[1]))
    return [
        [(value, place // longest, place // longest + place % longest) for value, place in zip(*row, strict=True)]
        for row in (
            (kept[: int(possible)], at[: int(possible)])
            for kept, at, possible in zip(values.tolist(), places.tolist(), (values != -math.inf).sum(1), strict=True)
        )
    ]


def answer_of(windows: Sequence[Prediction], context: str, count: int, null_threshold: float) -> Prediction:
    """The answer to a question, from what was found in the windows of its context, with the `count` best candidates.

    Args:
        windows: {spans: [[score, start, end], …]}, with characters of the context, and `null`, the score of "no
            answer", where that is possible; of all windows the least counts.
    """
    scores: dict[tuple[int, int], float] = {}
    for score, start, end in (span for window in windows for span in window["spans"]):
        place = stripped(context, start, end)
        scores[place] = max(score, scores.get(place, score))
    ranked = sorted(scores.items(), key=lambda one: (-one[1], one[0]))[:count]
    candidates = [_candidate(context[start:end], score, start, end) for (start, end), score in ranked]
    null = min((window["null"] for window in windows if "null" in window), default=None)
    best = candidates[0]
    if null is not None:
        candidates.append(_candidate("", null))
        best = candidates[-1] if null - best["score"] > null_threshold else best
    total = sum(math.exp(one["score"] - max(c["score"] for c in candidates)) for one in candidates)
    for one in candidates:
        one["probability"] = math.exp(one["score"] - max(c["score"] for c in candidates)) / total
    return best | {"candidates": sorted(candidates, key=lambda one: -one["score"])}


def first_sentence(context: str) -> Prediction:
    """The context's first sentence as the answer."""
    found = SENTENCE.search(context)
    start, end = stripped(context, *found.span()) if found else (0, 0)
    return sure(context[start:end], start, end)


def sure(answer: str, start: int | None = None, end: int | None = None) -> Prediction:
    """An answer without an alternative; "" has no place."""
    only = _candidate(answer, 0.0, start, end) | {"probability": 1.0}
    return only | {"candidates": [only]}


def stripped(context: str, start: int, end: int) -> tuple[int, int]:
    """The same piece of the context without white space at its ends."""
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _candidate(answer: str, score: float, start: int | None = None, end: int | None = None) -> dict[str, Any]:
    return {"answer": answer, "start": start, "end": end, "score": score}
