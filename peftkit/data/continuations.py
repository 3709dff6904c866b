"""Prompt and continuation as token ids, cut where the model has to take over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftkit.data.prompts import bare_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ":", "a")


def continued_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, ids of the text behind it) for each pair, without special tokens.

    The prompt's ids are those that it has alone, because that is what text is generated after. The text's are what the
    whole has beyond them. Where a token would span both, as the space does that a prompt should not end in, the text
    has the ids that it has behind other text: no second space is made up in front of it.
    """
    wholes = bare_ids(tokenizer, [prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    return [
        (ids, whole[len(ids) :] if whole[: len(ids)] == ids else _behind_text(tokenizer, text))
        for ids, whole, text in zip(bare_ids(tokenizer, prompts), wholes, texts, strict=True)
    ]


def _behind_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that something stands in front of; alone, some tokenizers would begin it with a space."""
    for anchor, whole in zip(ANCHORS, bare_ids(tokenizer, [anchor + text for anchor in ANCHORS]), strict=True):
        ids = bare_ids(tokenizer, [anchor])[0]
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return bare_ids(tokenizer, [text])[0]
