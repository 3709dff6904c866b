"""Prompts made from a template, cut to a number of tokens: what the columns hold is cut, the template never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftkit.data.files import Rows
from peftkit.data.templates import columns, render, render_rows, value_as_text
from peftkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text, such as Llama's `<s>`.

    Those that some put behind it, such as `</s>`, would end a text that the model is to continue.
    """
    whole: list[int] = tokenizer(PROBE).input_ids
    bare: list[int] = tokenizer(PROBE, add_special_tokens=False).input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def bare_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens around it."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    return ids


def fitted_prompts(
    template: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, room: int, preamble: str = ""
) -> tuple[list[str], int]:
    """(`preamble` and the rendered template for each row, rows that were cut); each in at most `room` tokens.

    Where a prompt is too long its columns lose their ends, the longest first.

    Raises:
        DataError: the preamble and the template alone leave no room; or as `render_rows`, with the place.
    """
    texts = [preamble + text for text in render_rows(template, rows)]
    too_long = [index for index, ids in enumerate(bare_ids(tokenizer, texts)) if len(ids) > room]
    for index in too_long:
        shorter = _shortened(template, rows.records[index], tokenizer, room, preamble)
        if shorter is None:
            raise DataError(
                f"{rows.where(index)}: the template{', the demonstrations' if preamble else ''} and the answer leave "
                "no token for the text; raise task.max_length or shorten them"
            )
        texts[index] = shorter
    return texts, len(too_long)


def _shortened(
    template: str, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, room: int, preamble: str
) -> str | None:
    """The prompt with its columns cut; None where not even a token of each fits."""
    record = {column: value_as_text(record, column) for column in columns(template)}
    while True:
        text = preamble + render(template, record)
        excess = len(bare_ids(tokenizer, [text])[0]) - room
        if excess <= 0:
            return text
        # joined to the template a text may have a token more than alone, so cutting may take another round
        ends = {column: _token_ends(tokenizer, value) for column, value in record.items()}
        most = _longest_allowed([len(one) for one in ends.values()], excess)
        if most < 1:
            return None
        record = {column: record[column][: (ends[column] or [0])[:most][-1]] for column in record}


def _token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where each token of a text ends, in characters."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [end for _, end in encoding.offset_mapping]


def _longest_allowed(lengths: Sequence[int], excess: int) -> int:
    """The length that all are cut down to so that together they lose `excess`."""
    most, allowed = max(lengths, default=0), sum(lengths) - excess
    while most > 0 and sum(min(length, most) for length in lengths) > allowed:
        most -= 1
    return most
