"""A plan in plain text."""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.planning.estimate import Estimate, in_gib
from peftkit.planning.plan import Plan


def shown(plan: Plan) -> str:
    """What `peftkit plan` prints."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    now = plan.estimate
    trace, run = now.trace, plan.run
    yield f"backbone    {run.backbone.name} ({run.backbone.dtype}), {trace.blocks} blocks"
    share = 100 * trace.trained_parameters / trace.parameters
    yield (
        f"method      {run.method.kind}: {trace.trained_parameters:,} of {trace.parameters:,} parameters train "
        f"({share:.2f} %)"
    )
    yield f"machine     {now.machine.name}; rates: {now.machine.source}"
    yield f"batches     {now.work.note}"
    yield (
        f"            training {_batch(now.work.shape)}, evaluation {_batch(now.work.evaluation_shape)}; "
        f"{now.work.steps:,} steps of {now.work.step_parts:.3g} micro-batches a process"
    )
    yield ""
    yield from (f"  {name:26} {in_gib(size):>12}" for name, size in now.parts.items())
    yield ""
    yield "peak of each phase, one process"
    yield from (f"  {name:26} {in_gib(size):>12}" for name, size in now.phases.items())
    if plan.checkpointed:
        other = "without" if run.training.gradient_checkpointing else "with"
        yield f"  {other + ' gradient checkpointing':26} {in_gib(plan.checkpointed.peak):>12}"
    yield ""
    yield f"time        {_time(now)}"
    yield f"memory      {in_gib(now.peak)} of {in_gib(now.limit)}: {_verdict(now)}"
    if not now.fits:
        yield from _change(plan)
    if plan.alternatives:
        yield ""
        yield from _compared(plan)


def _change(plan: Plan) -> Iterator[str]:
    if plan.change is None:
        yield "            no change that was tried makes it fit"
        return
    found, now = plan.change.estimate, plan.estimate
    slower = f"{found.seconds / now.seconds:.2f} × the time" if now.seconds else ""
    yield f"cheapest    {plan.change.text}   → {in_gib(found.peak)}, {slower}"


def _compared(plan: Plan) -> Iterator[str]:
    yield f"{'method':24} {'trained':>14} {'memory':>12} {'time':>12}  fits"
    for one in plan.alternatives:
        found = one.estimate
        if found is None:
            yield f"{one.name:24} {one.note}"
            continue
        yield (
            f"{one.name:24} {found.trace.trained_parameters:>14,} {in_gib(found.peak):>12} "
            f"{_duration(found.seconds):>12}  {'yes' if found.fits else 'no'}"
        )


def _verdict(found: Estimate) -> str:
    return "fits" if found.fits else "does not fit"


def _batch(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]} tokens"


def _time(found: Estimate) -> str:
    step = f"{found.step_seconds:.3g} s a step"
    if not found.work.steps:
        return f"{step} (the number of steps needs the data, or training.max_steps)"
    return (
        f"{step}, {_duration(found.seconds)} in all, evaluations included; {found.flops / 1e9:,.1f} GFLOP a micro-batch"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
