"""What can be asked of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftkit.backbones.load import BackboneSettings
from peftkit.backbones.quantization import Dtype
from peftkit.errors import UsageError

SHARD_BYTES = 50 * 10**9
"""transformers' own choice."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BESIDE = 2**25
"""Bytes that are set aside for the tokenizer and what else lies beside the weights."""

Onto = Literal["trained", "full-precision", "requantized"]


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

    def check(self, backbone: BackboneSettings) -> None:
        """Refuse what is for quantised runs where the run is none.

        Raises:
            UsageError: names the option.
        """
        if self.onto == "trained":
            return
        option = "--requantize" if self.onto == "requantized" else "--onto full-precision"
        if backbone.quantization is None:
            raise UsageError(f"{option} is for runs over a quantised backbone, and this one's is not; leave it out")
        if self.onto == "requantized":
            from peftkit.artifacts.requantize import check_packing

            check_packing(backbone.quantization)

    def dtype_for(self, backbone: BackboneSettings) -> str:
        """What the weights are saved in."""
        return self.dtype or ("bfloat16" if backbone.quantization else backbone.dtype)
