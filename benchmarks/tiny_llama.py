"""A Llama with random weights that reads and writes any text, byte by byte: small enough to be served on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = ("<s>", "</s>", "<pad>")


def make(folder: Path, **settings: Any) -> Path:
    """Write configuration, weights of seed 0 and tokenizer into `folder`, and return it.

    Args:
        settings: of the `LlamaConfig`, beside its vocabulary of all bytes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    pieces = save_byte_tokenizer(folder)
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=pieces, **tokens, **settings)).save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> int:
    """Write a tokenizer whose tokens are bytes into `folder`; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    first, last, pad = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=last, pad_token=pad).save_pretrained(
        folder
    )
    return len(pieces)
