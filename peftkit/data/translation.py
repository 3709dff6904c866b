"""Texts through an encoder-decoder that translates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit.backbones.load import HUB_FILES, BackboneSettings, resolve
from peftkit.errors import BackboneError, first_line
from peftkit.quiet import quiet_libraries

TOKENIZER_FILES = (*HUB_FILES, "*.spm")  # Marian's


def translated(
    texts: Sequence[str],
    name: str,
    prefix: str,
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None,
    seed: int,
) -> list[str]:
    """What the model of this name makes of each text, in order; nothing ("") of none, and of one that is too long.

    torch's generators are left as they were.

    Raises:
        BackboneError: no such model, or one that is no encoder-decoder.
    """
    import torch

    how: dict[str, Any] = {"do_sample": temperature is not None, "num_beams": 1, "max_new_tokens": max_new_tokens}
    how |= {"temperature": temperature, "top_k": 0} if temperature is not None else {}
    found = [""] * len(texts)
    with torch.random.fork_rng(), torch.no_grad(), quiet_libraries():
        model, tokenizer = _loaded(name)
        torch.manual_seed(seed)
        order = _that_fit([prefix + text if text.strip() else "" for text in texts], model, tokenizer)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = tokenizer([prefix + texts[index] for index in indices], padding=True, return_tensors="pt")
            made = model.generate(
                **{key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}, **how
            )
            for index, text in zip(indices, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                found[index] = text
    return found


def _that_fit(texts: Sequence[str], model: Any, tokenizer: Any) -> list[int]:
    """The texts that are some and that the model takes whole, shortest first."""
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    lengths = [len(tokenizer(text)["input_ids"]) if text else longest + 1 for text in texts]
    return sorted((index for index, length in enumerate(lengths) if length <= longest), key=lengths.__getitem__)


def _loaded(name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = resolve(BackboneSettings(name=name), TOKENIZER_FILES)
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # transformers raises many kinds
        raise BackboneError(
            f"back-translation: cannot load '{name}' as an encoder-decoder: {first_line(error)}"
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
