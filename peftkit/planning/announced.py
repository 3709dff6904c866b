"""The memory that a training is announced with. It must cost little and never stop a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.config import Run
from peftkit.errors import first_line
from peftkit.memory import available_bytes
from peftkit.planning.estimate import estimate, in_gib
from peftkit.planning.machines import Machine, without_rates
from peftkit.planning.plan import weigher
from peftkit.planning.workload import from_data
from peftkit.prepare import Prepared
from peftkit.training.meter import EXPECTED

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

TINY = 1_000_000
"""Parameters below which what the model takes is lost in what the process takes."""


@dataclass(frozen=True)
class Expected:
    """What is said before a training."""

    peak: int | None
    text: str


def expect_memory(run: Run, data: Prepared, model: nn.Module, accelerator: Accelerator) -> str:
    """What the run will hold, in words; the figure stays with the model for the record of its training."""
    if sum(one.numel() for one in model.parameters()) < TINY:
        return "no estimate: a model so small takes next to nothing"
    try:
        found = _expected(run, data, accelerator)
    except Exception as error:  # other libraries' code runs here without values, which may fail in any way
        return f"no estimate: {first_line(error)}"
    setattr(model, EXPECTED, found.peak)
    return found.text


def _expected(run: Run, data: Prepared, accelerator: Any) -> Expected:
    processes = accelerator.num_processes
    found = estimate(
        run,
        data.head,
        from_data(run, data, processes, weigher(run)),
        _device(accelerator),
        _sharding(accelerator),
    )
    phase = max(found.phases, key=found.phases.__getitem__)
    rows, length = found.work.evaluation_shape if phase == "evaluation" else found.work.shape
    less = "" if found.fits else f", MORE THAN the {in_gib(found.limit)} that are free: see `peftkit plan`"
    return Expected(found.peak, f"a peak of about {in_gib(found.peak)}, in {phase} ({rows} × {length} tokens){less}")


def _sharding(accelerator: Any) -> str:
    """How its processes share the work."""
    if accelerator.num_processes == 1:
        return "none"
    return "fsdp2" if getattr(accelerator, "sharding", None) else "ddp"


def _device(accelerator: Any) -> Machine:
    """Where the run takes place."""
    import torch

    on_gpu = accelerator.device.type == "cuda"
    free = int(torch.cuda.mem_get_info()[0]) if on_gpu else available_bytes()
    return without_rates("gpu" if on_gpu else "cpu", free, accelerator.num_processes)
