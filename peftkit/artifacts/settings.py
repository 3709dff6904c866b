"""What can be asked of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftkit.backbones.load import BackboneSettings
from peftkit.backbones.quantization import FP4, NF4, Dtype, Int8, Quantization
from peftkit.errors import UsageError

SHARD_BYTES = 50 * 10**9
"""transformers' own choice."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BESIDE = 2**25
"""Bytes that are set aside for the tokenizer and what else lies beside the weights."""

Onto = Literal["trained", "full-precision", "requantized"]
Packing = Literal["nf4", "fp4", "int8"]
PACKINGS: dict[str, type[NF4] | type[FP4] | type[Int8]] = {"nf4": NF4, "fp4": FP4, "int8": Int8}


@dataclass(frozen=True)
class MergeSettings:
    """What the merged model is computed in, and what is written."""

    dtype: Dtype | None = None
    """Of the saved weights; default: that of the run's backbone, and bfloat16 where it was quantised."""
    precision: Literal["float32", "float64"] = "float32"
    """What W + ΔW is computed in, before it is cast once."""
    shard_bytes: int = SHARD_BYTES
    onto: Onto = "trained"
    """Of a quantised run: the values that training saw, the checkpoint before it was quantised, or the first, packed
    anew as bitsandbytes packs."""
    pack: Packing | None = None
    """Pack the linear layers of the blocks of any run as bitsandbytes does."""
    drop_layers: int = 0
    """Blocks that are left out, from the top."""

    def check(self, backbone: BackboneSettings) -> None:
        """Refuse what is for quantised runs where the run is none, and two ways to pack.

        Raises:
            UsageError: names the option.
        """
        if self.onto == "requantized" and self.pack:
            raise UsageError("--requantize packs as the run was, and --quantize as it says; leave one out")
        if self.onto == "trained":
            return
        option = "--requantize" if self.onto == "requantized" else "--onto full-precision"
        if backbone.quantization is None:
            raise UsageError(f"{option} is for runs over a quantised backbone, and this one's is not; leave it out")
        if self.onto == "requantized":
            from peftkit.artifacts.requantize import check_packing

            check_packing(backbone.quantization)

    @property
    def is_whole(self) -> bool:
        """Whether the merged model is to compute what the run did, rather than something near it."""
        return self.onto == "trained" and not self.pack and not self.drop_layers

    def packing(self, backbone: BackboneSettings) -> Quantization | None:
        """How linear layers are packed when they are saved; None where they stay plain."""
        if self.onto == "requantized":
            return backbone.quantization
        return PACKINGS[self.pack](compute_dtype=self.dtype_for(backbone)) if self.pack else None

    def dtype_for(self, backbone: BackboneSettings) -> str:
        """What the weights are saved in."""
        return self.dtype or ("bfloat16" if backbone.quantization else backbone.dtype)
