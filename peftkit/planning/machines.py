"""What a run is planned for: this machine, or GPUs by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftkit.errors import UsageError
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from peftkit.planning.ledger import Operation

GIB = 2**30
CONTEXT = round(0.6 * GIB)
"""What CUDA and its libraries take of a GPU before the first tensor."""
USABLE = 0.985
"""Of the memory that a GPU is sold with, what programs see."""
EFFICIENCY = 0.4
"""Of its datasheet's rate, what a GPU is taken to reach in training: an assumption; big models reach 0.3 to 0.6."""
OF_BANDWIDTH = 0.8
LAUNCH = 6e-6
"""Seconds that starting a kernel takes the CPU, which small models wait for."""


@dataclass(frozen=True)
class Gpu:
    """A row of a datasheet: dense rates in TFLOP/s, bandwidth in GB/s, memory in GiB."""

    name: str
    memory: float
    half: float
    """bfloat16 or float16 with sums in float32; without bfloat16 units, float16."""
    single: float
    bandwidth: float
    has_bfloat16: bool = True


# fmt: off
GPUS = (
    Gpu("T4", 16, 65, 8.1, 320, has_bfloat16=False),
    Gpu("V100-16GB", 16, 125, 15.7, 900, has_bfloat16=False),
    Gpu("V100-32GB", 32, 125, 15.7, 900, has_bfloat16=False),
    Gpu("L4", 24, 121, 30.3, 300),
    Gpu("A10G", 24, 70, 35, 600),
    Gpu("L40S", 48, 362, 91.6, 864),
    Gpu("A6000", 48, 155, 38.7, 768),
    Gpu("RTX3090", 24, 71, 35.6, 936),
    Gpu("RTX4090", 24, 165, 82.6, 1008),
    Gpu("RTX5090", 32, 209, 104.8, 1792),
    Gpu("A100-40GB", 40, 312, 19.5, 1555),
    Gpu("A100-80GB", 80, 312, 19.5, 2039),
    Gpu("H100", 80, 989, 67, 3350),
    Gpu("H200", 141, 989, 67, 4800),
    Gpu("B200", 180, 2250, 80, 8000),
    Gpu("MI300X", 192, 1307, 163, 5300),
)
# fmt: on
NAMES = {gpu.name: gpu for gpu in GPUS} | {"A100": next(gpu for gpu in GPUS if gpu.name == "A100-80GB")}


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place."""

    name: str
    kind: str
    """`cpu` or `gpu`."""
    memory: int
    """Bytes that a process can take on one device."""
    count: int
    """GPUs; 1 for a CPU."""
    rates: Mapping[str, float]
    """Arithmetic of matrix products a second, by dtype."""
    bandwidth: float
    """Bytes read and written a second."""
    random: float
    """Random numbers a second."""
    launch: float
    """Seconds that any operation takes at least."""
    source: str
    """Where the rates come from, in plain words."""

    def seconds(self, operations: Counter[Operation], scale: float = 1.0) -> float:
        """The time that these take: each as long as its arithmetic or its traffic, whichever is longer.

        Args:
            scale: how many times as many tokens go through them.
        """
        return sum(times * self._of_one(one, scale) for one, times in operations.items())

    def _of_one(self, one: Operation, scale: float) -> float:
        rate = self.rates.get(one.dtype, self.rates["float32"])
        return self.launch + scale * (max(one.flops / rate, one.bytes / self.bandwidth) + one.random / self.random)


def without_rates(kind: str, memory: int, count: int = 1) -> Machine:
    """A machine of which only memory is asked, not time."""
    return Machine(
        name=kind,
        kind=kind,
        memory=memory,
        count=count,
        rates={"float32": 1e12},
        bandwidth=1e10,
        random=1e9,
        launch=LAUNCH,
        source="",
    )


def gpus(text: str) -> Machine:
    """`4xA100-80GB` or `T4` as a machine, by its datasheet.

    Raises:
        UsageError: no number of a GPU that is in the table.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX×*]\s*)?(.+)", text.strip())
    wanted = re.sub(r"[\s_]|NVIDIA|GEFORCE|AMD", "", match[2].upper()) if match else ""
    known = {re.sub("GB$", "", name): gpu for name, gpu in NAMES.items()}
    gpu = known.get(re.sub("GB$", "", wanted))
    count = int(match[1] or 1) if match else 0
    if gpu is None or not count:
        raise UsageError(
            f"--gpus: '{text}' is not a number of known GPUs such as 4xA100-80GB{did_you_mean(wanted, NAMES)}"
        )
    half, single = gpu.half * 1e12 * EFFICIENCY, gpu.single * 1e12 * EFFICIENCY
    return Machine(
        name=f"{count} × {gpu.name}" if count > 1 else gpu.name,
        kind="gpu",
        memory=round(gpu.memory * GIB * USABLE) - CONTEXT,
        count=count,
        rates={"float32": single, "float16": half, "bfloat16": half if gpu.has_bfloat16 else single},
        bandwidth=gpu.bandwidth * 1e9 * OF_BANDWIDTH,
        random=gpu.bandwidth * 1e9 * OF_BANDWIDTH / 4,
        launch=LAUNCH,
        source=f"datasheet; {EFFICIENCY:.0%} of its arithmetic and {OF_BANDWIDTH:.0%} of its bandwidth are assumed",
    )


def memory_size(text: str) -> int:
    """`24GiB`, `24GB` or `800MiB` in bytes.

    Raises:
        UsageError: something else.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]I?B)", text.strip().upper())
    if match is None or not float(match[1]):
        raise UsageError(f"--memory: '{text}' is not an amount of memory such as 24GiB or 800MiB")
    return round(float(match[1]) * units[match[2]])
