"""A BERT of one layer with random weights, whose tokens are letters: small enough to be loaded for every input."""

from __future__ import annotations

import string
from pathlib import Path


def make(folder: Path) -> Path:
    """Write configuration, weights and tokenizer into `folder`, and return it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder
