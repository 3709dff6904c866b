"""A merged model packed anew by bitsandbytes, in the form that transformers saves and loads.

It is another model than the one that was trained: every weight that ΔW moved is rounded once more. What that costs is
measured and told with the merge.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.modules import linears
from peftkit.backbones.quantization import FourBit, Quantization
from peftkit.backbones.quantize import packable
from peftkit.errors import UsageError

BLOCK = 64
"""The only block size of 4-bit weights that transformers has a setting for."""
TOLERANCE = {"nf4": 5e-2, "fp4": 5e-2, "int8": 0.25}
"""Largest |Δlogit| / max(1, |logit|) between the layers that transformers loads and those that training computes with;
in int8 the former round inputs to 8 bits too."""


def check_packing(settings: Quantization) -> None:
    """Refuse what transformers has no form for.

    Raises:
        UsageError: blocks of another size than 64.
    """
    if isinstance(settings, FourBit) and settings.block_size != BLOCK:
        raise UsageError(
            f"--requantize: transformers saves 4-bit weights in blocks of {BLOCK} alone, and the run has "
            f"backbone.quantization.block_size {settings.block_size}; merge without it"
        )


def save_packed(model: Any, model_class: str, settings: Quantization, folder: Path, shard_bytes: int) -> None:
    """Save a plain model with the layers packed that training packed.

    Args:
        model_class: one of transformers' auto classes.
    """
    import transformers

    packed = set(packable(model, layout_for(model.config.model_type, model)))
    whole = [name for name, _ in linears(model) if name not in packed]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".peftkit-") as scratch, _quiet():
        model.save_pretrained(scratch)
        loaded = getattr(transformers, model_class).from_pretrained(
            scratch, local_files_only=True, dtype=model.dtype, quantization_config=_how(settings, whole)
        )
        loaded.save_pretrained(folder, max_shard_size=shard_bytes)


def _how(settings: Quantization, whole: list[str]) -> Any:
    """The same in transformers' words."""
    from transformers import BitsAndBytesConfig

    if not isinstance(settings, FourBit):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=settings.compute_dtype,
        bnb_4bit_quant_storage=settings.storage_dtype,
        llm_int8_skip_modules=whole,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, bitsandbytes does not say of each product that it casts inputs."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
