"""Examples of different lengths as one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of positions without supervision; torch's cross-entropy skips it too."""


def collate(examples: Sequence[dict[str, Any]], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad on the right: token ids to the longest example, labels to the longest labels.

    Returns:
        input_ids, attention_mask and any token_type_ids of shape (examples, tokens); labels of shape (examples,) or
        (examples, most labels); other numbers of shape (examples,). What else an example holds stays a list.
    """
    import torch

    fills = {"input_ids": pad_id, "token_type_ids": 0, "labels": IGNORED}
    batch: dict[str, Any] = {}
    for key in examples[0]:
        column = [example[key] for example in examples]
        if isinstance(column[0], int | float):
            batch[key] = torch.tensor(column, device=device)
        elif key in fills:
            batch[key] = torch.tensor(padded(column, fills[key]), device=device)
        else:
            batch[key] = column
    lengths = torch.tensor([len(example["input_ids"]) for example in examples], device=device)
    batch["attention_mask"] = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).long()
    return batch


def padded(rows: Sequence[Sequence[Any]], fill: int) -> list[list[Any]]:
    """Rows filled up on the right to the longest."""
    longest = max(map(len, rows))
    return [[*row, *[fill] * (longest - len(row))] for row in rows]
