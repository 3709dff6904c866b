"""A BERT with random weights and a vocabulary of one's own: small enough to be trained or loaded for every trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make(folder: Path, words: Sequence[str], **settings: Any) -> Path:
    """Write configuration, weights of seed 0 and tokenizer into `folder`, and return it.

    Args:
        words: the vocabulary behind the special tokens.
        settings: of the `BertConfig`, beside its vocabulary and at most 64 tokens.
    """
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*SPECIAL, *words]
    save_bert_tokenizer(folder, vocabulary)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **settings)
    BertModel(config).save_pretrained(folder)
    return folder


def save_bert_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """Write a tokenizer of these tokens, special ones among them, into `folder`."""
    from transformers import BertTokenizer

    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(file)).save_pretrained(folder)
