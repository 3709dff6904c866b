"""How a backbone can be quantised by bitsandbytes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from peftkit.schema import Section

Dtype = Literal["float32", "bfloat16", "float16"]


class FourBit(Section):
    """QLoRA's storage (Dettmers et al. 2023): 4-bit codes, and the largest magnitude of each block of weights."""

    kind: Literal["nf4", "fp4"]
    double: bool = True
    """Hold the blocks' magnitudes in 8 bits: 0.127 instead of 0.5 bits a weight in blocks of 64."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    compute_dtype: Dtype = "bfloat16"
    """What inputs and unpacked weights are multiplied in."""
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """What the packed codes are seen as; the bytes are the same. FSDP1 shards none but floating point numbers."""

    def __str__(self) -> str:
        return f"{self.kind} in blocks of {self.block_size}{', doubly quantised' if self.double else ''}"


class NF4(FourBit):
    """The codes are quantiles of a normal distribution."""

    kind: Literal["nf4"] = "nf4"


class FP4(FourBit):
    """The codes are 4-bit floating point numbers."""

    kind: Literal["fp4"] = "fp4"


class Int8(Section):
    """The storage of LLM.int8() (Dettmers et al. 2022): whole numbers up to 127, and a scale for each output row.

    Inputs are not quantised, so that training, evaluation and the merged model compute with the same weights.
    """

    kind: Literal["int8"] = "int8"
    compute_dtype: Dtype = "bfloat16"
    """What inputs and unpacked weights are multiplied in."""

    def __str__(self) -> str:
        return self.kind


Quantization = NF4 | FP4 | Int8
AnyQuantization = Annotated[Quantization, Field(discriminator="kind")]


def refuse_quantized(why: str, quantization: Quantization | None) -> list[str]:
    """The conflict of a method with a quantised backbone, if there is one."""
    if quantization is None:
        return []
    return [f"{why}, which {quantization.kind} does not allow; leave backbone.quantization out"]
