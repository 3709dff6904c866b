"""How likely a language model finds given continuations of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftkit.data.collate import collate
from peftkit.tasks.base import Batch
from peftkit.tasks.outputs_read import logits_at

if TYPE_CHECKING:
    from torch import Tensor, nn

Ids = tuple[int, ...]
Words = tuple[Ids, ...]
"""Continuations of one prompt, as token ids."""


@dataclass(frozen=True)
class _Sequence:
    """A prompt with the beginning of continuations behind it, which serves all that begin so."""

    row: int
    beginning: Ids
    columns: tuple[int, ...]


def log_likelihoods(model: nn.Module, batch: Batch, words: Sequence[Words]) -> Tensor:
    """log p(tokens of a continuation | prompt), summed over its tokens (nats), in float32.

    The prompts are the batch's `input_ids`. Continuations that begin alike share a forward pass: where all are of
    one token there is a single pass, and never more than one for each continuation.

    Args:
        words: for each example equally many continuations.

    Returns:
        shape (examples, continuations).
    """
    import torch

    found = torch.zeros(len(words), len(words[0]), device=batch["input_ids"].device)
    for sequences in _passes(words):
        logits = _logits_behind_prompts(model, batch, sequences)
        items, tokens, rows, columns = found.new_tensor(_places(sequences, words), dtype=torch.long).unbind(1)
        nats = logits[items, tokens] - logits.logsumexp(-1)[items]
        found = found.index_put((rows, columns), nats, accumulate=True)
    return found


def _passes(words: Sequence[Words]) -> Iterator[list[_Sequence]]:
    """One forward pass after the other; of each example at most one sequence is in it."""
    plans = {own: list(_plan(own).items()) for own in set(words)}
    for turn in range(max(map(len, plans.values()))):
        taking_part = ((row, plans[own]) for row, own in enumerate(words) if turn < len(plans[own]))
        yield [_Sequence(row, plan[turn][0], tuple(plan[turn][1])) for row, plan in taking_part]


def _plan(words: Words) -> dict[Ids, list[int]]:
    """What must stand behind the prompt, and the continuations (by index) that each serves; their last tokens need
    not be read. A beginning of another beginning is served by that one."""
    wanted = sorted({ids[:-1] for ids in words}, key=len, reverse=True)
    kept: list[Ids] = []
    for ids in wanted:
        if not any(longer[: len(ids)] == ids for longer in kept):
            kept.append(ids)
    plan: dict[Ids, list[int]] = {ids: [] for ids in kept}
    for column, ids in enumerate(words):
        plan[next(one for one in kept if one[: len(ids) - 1] == ids[:-1])].append(column)
    return plan


def _places(sequences: Sequence[_Sequence], words: Sequence[Words]) -> list[tuple[int, int, int, int]]:
    """(row of the logits, token, example, continuation) of every token of every continuation."""
    places: list[tuple[int, int, int, int]] = []
    first = 0
    for one in sequences:
        for column in one.columns:
            tokens = enumerate(words[one.row][column], first)
            places.extend((item, token, one.row, column) for item, token in tokens)
        first += len(one.beginning) + 1
    return places


def _logits_behind_prompts(model: nn.Module, batch: Batch, sequences: Sequence[_Sequence]) -> Tensor:
    """Float32 logits (items, vocabulary): of each sequence those at the prompt's last token and behind it."""
    import torch

    sizes = batch["attention_mask"].sum(1).tolist()
    prompts = [batch["input_ids"][one.row, : sizes[one.row]].tolist() for one in sequences]
    examples = [{"input_ids": [*ids, *one.beginning]} for ids, one in zip(prompts, sequences, strict=True)]
    inputs = collate(examples, pad_id=0, device=batch["input_ids"].device)
    ends = torch.tensor([len(ids) for ids in prompts], device=inputs["input_ids"].device)
    at = torch.arange(inputs["input_ids"].shape[1], device=ends.device) >= ends[:, None] - 1
    return logits_at(model, inputs, at & inputs["attention_mask"].bool()).float()
