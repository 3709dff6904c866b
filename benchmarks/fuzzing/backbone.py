"""The backbone that is loaded for every input."""

from __future__ import annotations

import string
from pathlib import Path

from benchmarks import tiny_bert


def make(folder: Path) -> Path:
    """Write a BERT of one layer, whose tokens are letters, into `folder`, and return it."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *(f"##{one}" for one in letters)]
    return tiny_bert.make(
        folder, words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
