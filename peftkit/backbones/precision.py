"""The dtype that a backbone is held in, and what `auto` comes to on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

PROCESSOR = Path("/proc/cpuinfo")
MULTIPLY = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of processors that multiply bfloat16: Intel's and AMD's, and ARM's."""


def multiplies_bfloat16(processor: Path = PROCESSOR) -> bool:
    """Whether this processor multiplies bfloat16 itself; without, it takes longer than float32. False where the system
    does not tell."""
    return not MULTIPLY.isdisjoint(processor_flags(processor))


def processor_flags(processor: Path = PROCESSOR) -> frozenset[str]:
    """What this processor says that it can do; empty where the system does not tell."""
    try:
        lines = processor.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, ()))


def on_this_machine(dtype: str) -> str:
    """What a dtype that is written comes to."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if multiplies_bfloat16() else "float32"


Dtype = Annotated[Literal["float32", "bfloat16", "float16", "auto"], AfterValidator(on_this_machine)]
"""What is written; what is held is never `auto`, so that a run is named and recorded by what it computes in."""
