"""A merged model packed by bitsandbytes, in the form that transformers saves and loads.

It is another model than the one that was evaluated: every weight that is packed is rounded once more. What that costs
is measured and told with the merge.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.probe import digests
from peftkit.backbones.layouts import Layout, layout_for
from peftkit.backbones.modules import linears
from peftkit.backbones.quantization import FourBit, Quantization
from peftkit.backbones.quantize import packable
from peftkit.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from torch import nn

BLOCK = 64
"""The only block size of 4-bit weights that transformers has a setting for."""
TOLERANCE = {"nf4": 5e-2, "fp4": 5e-2, "int8": 0.25}
"""Largest |Δlogit| / max(1, |logit|) between the layers that transformers loads and those that peftkit packs. With
equal codes, the former multiply 4-bit weights in bfloat16 on a CPU, whatever was asked, and round inputs to 8 bits in
int8."""
SCALE_TOLERANCE = 2.0**-10
"""Of a row's scale in int8, relative: bitsandbytes rounds weights to float16 first, which may move a code by one."""


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


def check_rows(model: nn.Module, layout: Layout, settings: Quantization) -> None:
    """Refuse 4-bit blocks that reach over the end of a row, which bitsandbytes unpacks wrongly on a CPU.

    Raises:
        UsageError: names the layer.
    """
    if not isinstance(settings, FourBit):
        return
    for name in packable(model, layout):
        layer: Any = model.get_submodule(name)
        inputs = layer.in_features if hasattr(layer, "in_features") else layer.nx
        if inputs % BLOCK:
            raise UsageError(
                f"{settings.kind}: transformers saves 4-bit weights in blocks of {BLOCK} alone, which do "
                f"not fit the {inputs} inputs of '{name}'; use int8"
            )


def save_packed(model: Any, model_class: str, settings: Quantization, folder: Path, shard_bytes: int) -> dict[str, str]:
    """Save a plain model with the linear layers of its blocks packed; returns hashes of what was saved, by name.

    Args:
        model_class: one of transformers' auto classes.

    Raises:
        ArtifactError: transformers packed something else.
    """
    import transformers

    packed = packable(model, layout_for(model.config.model_type, model))
    whole = [name for name, _ in linears(model) if name not in packed]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".peftkit-") as scratch, _quiet():
        model.save_pretrained(scratch)
        loaded = getattr(transformers, model_class).from_pretrained(
            scratch,
            local_files_only=True,
            dtype=model.dtype,
            quantization_config=_how(settings, whole),
            device_map={"": "cpu"},  # where it is compared; left to itself, it goes to a GPU
        )
        _refuse_other(model, loaded, packed, settings)
        loaded.save_pretrained(folder, max_shard_size=shard_bytes)
    return digests(loaded, None)


def _refuse_other(model: Any, loaded: Any, packed: list[str], settings: Quantization) -> None:
    """Compare what transformers holds with what peftkit makes of the same weights: 4-bit codes and scales, and all that
    is not packed, bit for bit.

    Raises:
        ArtifactError: names the first that differs.
    """
    import torch

    from peftkit.backbones.quantized_layers import pack

    codes = {f"{name}.weight" for name in packed}
    plain, held = digests(model, None), digests(loaded, None)
    odd = [name for name in plain if name not in codes and plain[name] != held.get(name)]
    for name in packed:
        ours = pack(name, model.get_submodule(name), settings, torch.device("cpu"))
        if not _alike(ours, loaded.get_submodule(name), settings):
            odd.append(f"{name}.weight")
    if odd:
        raise ArtifactError(
            f"transformers packs '{odd[0]}' in another way than peftkit; nothing was written: merge without packing"
        )


def _alike(ours: Any, theirs: Any, settings: Quantization) -> bool:
    if type(theirs).__name__ not in ("Linear4bit", "Linear8bitLt"):
        return False
    if isinstance(settings, FourBit):
        return digests(ours, None) == digests(theirs, None)
    codes = (ours.weight.data.short() - theirs.weight.data.short()).abs().max()
    scales = theirs.state_dict()["SCB"]
    return int(codes) <= 1 and bool(((scales - ours.scales).abs() <= SCALE_TOLERANCE * ours.scales).all())


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
