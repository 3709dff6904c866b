"""What a run is expected to hold and to take on a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peftkit.backbones.load import Head
from peftkit.config import Run
from peftkit.memory import MAPPED as TIGHT
from peftkit.methods import Full
from peftkit.methods.from_peft import FromPeft
from peftkit.planning.held import Trace
from peftkit.planning.machines import GIB, Machine
from peftkit.planning.trace import expected
from peftkit.planning.workload import Workload
from peftkit.tasks.language_model import LanguageModel

MIB = 2**20
PAGE = 512
"""Bytes that torch's allocator on GPUs rounds up to."""
MAPPED = 32 * MIB
"""From this size on, glibc gives every block pages of its own and takes them back when it is freed (mallopt(3),
M_MMAP_THRESHOLD's greatest dynamic value)."""
HOLES, SETTLED = 1.4, 25
"""Smaller blocks leave holes that are a little too small for the next of their size. After n micro-batches the heap is
1 + HOLES · (1 − exp(−n / SETTLED)) times as large as what is alive in it; measured, see docs/plan.md."""
PINNED = 2.0
"""It is at least so many times as large where all weights train: the optimizer's state, which stays, then lies between
the blocks."""
EVALUATION_HEAP = 1.35
"""The same while nothing is kept for a backward pass."""
LIBRARIES = {"torch's kernels, transformers": 115 * MIB, "peft": 54 * MIB, "metrics": 125 * MIB}
"""Resident parts of libraries that come after the backbone; measured."""
TEMPORARIES = {"adamw": 2, "paged_adamw": 2, "sgd": 1, "adafactor": 3, "adamw_8bit": 1}
"""Float32 copies of a parameter that an optimizer makes to update it."""
SHARDING = ("none", "ddp", "fsdp2")


@dataclass(frozen=True)
class Estimate:
    """A run on a machine, in bytes of one process (and device) and seconds."""

    machine: Machine
    trace: Trace
    work: Workload
    phases: Mapping[str, int]
    """The most that is held while the backbone loads, in a training step, in the update, in an evaluation."""
    parts: Mapping[str, int]
    """What the peak of a training step consists of."""
    step_seconds: float
    evaluation_seconds: float
    """Of all evaluations."""
    limit: int

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit

    @property
    def seconds(self) -> float:
        """Training and evaluations; of one step where the number of steps is not known."""
        return max(self.work.steps, 1) * self.step_seconds + self.evaluation_seconds

    @property
    def flops(self) -> int:
        """Arithmetic of the traced micro-batch."""
        return sum(one.flops * times for one, times in self.trace.step.items())

    def as_dict(self) -> dict[str, Any]:
        """All figures, flat where they are single."""
        trace = self.trace
        return {
            "machine": self.machine.name,
            "limit_bytes": self.limit,
            "fits": self.fits,
            "peak_bytes": self.peak,
            "phases_bytes": dict(self.phases),
            "parts_bytes": dict(self.parts),
            "parameters": trace.parameters,
            "trained_parameters": trace.trained_parameters,
            "kept_activation_bytes": trace.kept,
            "steps": self.work.steps,
            "micro_batch": list(self.work.shape),
            "evaluation_batch": list(self.work.evaluation_shape),
            "micro_batch_flops": self.flops,
            "step_seconds": self.step_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "seconds": self.seconds,
            "batches": self.work.note,
            "rates": self.machine.source,
        }


def estimate(
    run: Run, head: Head, work: Workload, machine: Machine, sharding: str = "none", limit: int | None = None
) -> Estimate:
    """What `run` holds and takes.

    Args:
        sharding: `none`, `ddp` (every process has everything) or `fsdp2` (weights, gradients and states are divided).
        limit: bytes that it may hold; default: what the machine has.
    """
    tight = run.training.allocator == "tight"
    heap = partial(on_heap, _heap(run, work), TIGHT if tight else MAPPED)
    trace = expected(run, head, work, on_gpu if machine.kind == "gpu" else heap)
    shares = machine.count if sharding == "fsdp2" else 1
    phases, parts = _memory(run, trace, work, machine, sharding, shares)
    rows, length = work.shape
    scale = work.step_tokens / work.step_parts / (rows * length)
    step = work.step_parts * machine.seconds(trace.step, scale) if run.method.trains else 0.0
    if sharding == "fsdp2":
        # weights are gathered in both passes, gradients scattered in one
        step += 3 * trace.weights / machine.bandwidth
    rows, length = work.evaluation_shape
    batches = work.evaluation_tokens / (rows * length) / machine.count
    return Estimate(
        machine=machine,
        trace=trace,
        work=work,
        phases=phases,
        parts=parts,
        step_seconds=step,
        evaluation_seconds=batches * machine.seconds(trace.predict),
        limit=machine.memory if limit is None else limit,
    )


def on_gpu(size: int) -> int:
    """What torch's allocator counts as allocated for a storage."""
    return -(-size // PAGE) * PAGE


def on_heap(factor: float, mapped: int, size: int) -> int:
    """What a storage adds to a process's resident memory under glibc, whose heap is `factor` times what is in it and
    which gives blocks of `mapped` bytes and more pages of their own."""
    return size if size >= mapped else round(factor * size)


def _heap(run: Run, work: Workload) -> float:
    """How many times as large as what is alive in it glibc's heap becomes in a run."""
    worn = HOLES * (1 - math.exp(-work.steps * work.step_parts / SETTLED))
    return max(PINNED, 1 + worn) if isinstance(run.method, Full) else 1 + worn


def _memory(
    run: Run, trace: Trace, work: Workload, machine: Machine, sharding: str, shares: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Phases, and the parts of a step's peak."""
    libraries = _libraries(run) if machine.kind == "cpu" else 0
    gathered = 2 * trace.largest_block if shares > 1 else 0
    weights, state, gradients = trace.weights // shares + gathered, trace.state // shares, trace.trained // shares
    # what data-parallel gradients are averaged in
    buckets = gradients if sharding == "ddp" and machine.count > 1 else 0
    activations = trace.peak - trace.weights
    if shares > 1:
        activations -= min(activations, trace.trained - gradients) if trace.peaks else 0
    evaluation = trace.evaluation - trace.weights
    tight = run.training.allocator == "tight"
    if machine.kind == "cpu" and not tight:
        evaluation = round(evaluation * EVALUATION_HEAP / _heap(run, work))
    parts = {"libraries": libraries, "weights": weights, "optimizer": state, "activations and gradients": activations}
    if buckets:
        parts["gradient buckets"] = buckets
    resting = libraries + weights + state + buckets
    update = resting + gradients + _update_transient(run, trace, machine) // shares
    kept = activations if machine.kind == "cpu" and not tight else 0  # a heap does not shrink
    phases = {
        "loading": libraries + weights,
        "training step": resting + activations if run.method.trains else 0,
        "update": update if run.method.trains else 0,
        "evaluation": resting + evaluation + kept,
        "checkpoint": resting + gradients if run.method.trains else 0,
    }
    return {name: size for name, size in phases.items() if size}, {name: size for name, size in parts.items() if size}


def _libraries(run: Run) -> int:
    names = ["torch's kernels, transformers"]
    if isinstance(run.method, FromPeft):
        names.append("peft")
    if not isinstance(run.task, LanguageModel):
        names.append("metrics")
    return sum(LIBRARIES[name] for name in names)


def _update_transient(run: Run, trace: Trace, machine: Machine) -> int:
    """Temporaries of an optimizer step: on GPUs torch's AdamW takes all parameters at once, elsewhere one by one."""
    if run.training.optimizer == "adamw" and machine.kind == "gpu":
        return trace.trained
    return TEMPORARIES[run.training.optimizer] * 4 * trace.largest_trained


def in_gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
