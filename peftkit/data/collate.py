"""Examples of different lengths as one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of positions without supervision; torch's cross-entropy skips it too."""


def collate(examples: Sequence[dict[str, Any]], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad on the right to the longest example.

    Returns:
        input_ids, attention_mask and any token_type_ids of shape (examples, tokens); labels of shape (examples,) or
        (examples, tokens); `words` stays a list.
    """
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    fills = {"input_ids": pad_id, "token_type_ids": 0, "attention_mask": 0, "labels": IGNORED}
    batch: dict[str, Any] = {}
    for key in examples[0]:
        column = [example[key] for example in examples]
        if key == "words":
            batch[key] = column
        elif isinstance(column[0], int):
            batch[key] = torch.tensor(column, device=device)
        else:
            rows = [list(row) + [fills[key]] * (longest - len(row)) for row in column]
            batch[key] = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples], device=device)
    batch["attention_mask"] = (torch.arange(longest, device=device) < lengths[:, None]).long()
    return batch
