"""Backbones held in 4 or 8 bits by bitsandbytes: the layers that are packed, and back again.

Only the linear layers of the repeated blocks are packed. Embeddings, tied or not, normalisations, biases, the output of
a language model and every head stay as they were loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.backbones.quantization import Int8, Quantization
from peftkit.backbones.targets import block_linears
from peftkit.errors import BackboneError, UsageError, first_line
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout


@dataclass(frozen=True)
class Packed:
    """What is packed in a model, and what it takes."""

    how: str
    modules: tuple[str, ...]
    bytes: int
    """Codes and scales together."""
    weights: int
    """How many the codes stand for."""


def quantize(model: nn.Module, layout: Layout, settings: Quantization) -> list[str]:
    """Pack the linear layers of the blocks, in place; returns their names.

    A model on the meta device gets layers of the same shapes, without weights.

    Raises:
        BackboneError: the blocks have no linear layer, or one whose rows the blocks of 4-bit weights do not fit.
    """
    with quiet_libraries():
        from peftkit.backbones.quantized_layers import pack, packing_device

    chosen = packable(model, layout)
    if not chosen:
        raise BackboneError("the blocks have no linear layer to quantise; leave backbone.quantization out")
    for name in chosen:
        model.set_submodule(name, pack(name, model.get_submodule(name), settings, packing_device(model)))
    # peft asks the model, not the layers
    setattr(model, f"is_loaded_in_{'8' if isinstance(settings, Int8) else '4'}bit", True)
    return chosen


def packable(model: nn.Module, layout: Layout) -> list[str]:
    """The linear layers that are packed, by name."""
    return [name for name in block_linears(model, layout) if not _must_stay(model, name)]


def dequantize(model: nn.Module) -> nn.Module:
    """Put plain layers, in float32 and with the values that training saw, in the place of packed ones."""
    from peftkit.backbones.quantized_layers import unpack

    for name, module in [one for one in model.named_modules() if is_quantized(one[1])]:
        model.set_submodule(name, unpack(module))
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)
    return model


def mend(model: nn.Module) -> nn.Module:
    """Let 4-bit layers that somebody else packed with bitsandbytes compute as peftkit's do, in place.

    On a CPU, bitsandbytes' own 4-bit layers give no gradients once the model was evaluated.

    Raises:
        BackboneError: blocks that do not fit the rows of a layer.
    """
    import sys

    if "bitsandbytes" in sys.modules:  # nothing is packed where it was never imported
        from peftkit.backbones.quantized_layers import adopt

        for module in model.modules():
            adopt(module)
    return model


def packed(model: nn.Module) -> Packed | None:
    """What is packed in a model; None where nothing is."""
    found: Any = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not found:
        return None
    from peftkit.backbones.quantized_layers import kind_of, packed_bytes

    return Packed(
        how=kind_of(next(iter(found.values()))),
        modules=tuple(found),
        bytes=sum(map(packed_bytes, found.values())),
        weights=sum(module.in_features * module.out_features for module in found.values()),
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer that `quantize` made."""
    return type(module).__name__ in ("FourBitLinear", "EightBitLinear")


def rows_of(layer: nn.Module, rows: Tensor) -> nn.Module:
    """A quantised layer of some outputs of another, with exactly their codes and scales."""
    from peftkit.backbones.quantized_layers import rows_of as packed_rows

    return packed_rows(layer, rows)


def check_backend(device: str, setting: str = "backbone.quantization") -> None:
    """See to it that bitsandbytes can pack on this device.

    Args:
        setting: what asks for it, for the message.

    Raises:
        UsageError: it is not installed, or has no code for the device.
    """
    try:
        with quiet_libraries():
            import bitsandbytes
        import torch

        bitsandbytes.functional.quantize_4bit(torch.ones(1, 64, device=device), quant_type="nf4")
    except Exception as error:  # a missing or unloadable library shows as any of many kinds
        raise UsageError(
            f"{setting} needs bitsandbytes, which does not work on {device} here ({first_line(error)}); "
            f"install a build of it for this device, or leave {setting} out"
        ) from error


def _must_stay(model: Any, name: str) -> bool:
    """Whether transformers holds a layer in float32 because the architecture reads its weights, as T5 does `wo`."""
    kept: Iterable[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))
