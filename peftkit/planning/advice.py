"""The cheapest change that makes a run fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peftkit.config import Run
from peftkit.planning.estimate import Estimate


@dataclass(frozen=True)
class Change:
    """A change of the configuration, and what comes of it."""

    values: dict[str, Any]
    """section.key, and its value."""
    estimate: Estimate
    sharding: str = "none"

    @property
    def settings(self) -> tuple[str, ...]:
        """As they are typed: section.key=value."""
        return tuple(f"{name}={_typed(value)}" for name, value in self.values.items())

    @property
    def text(self) -> str:
        """What to type."""
        return " ".join([*self.settings, *([f"--accelerate {self.sharding}"] if self.sharding != "none" else [])])


SHORTEST = 32
"""Tokens below which texts are not proposed to be cut."""
Estimating = Callable[[Run, str], Estimate | None]
"""What a changed run comes to; None where it cannot be."""


def cheapest(run: Run, now: Estimate, estimating: Estimating, sharding: str) -> Change | None:
    """The change that fits and costs least time; where no single one fits, one more beside the one that saves most.

    None where that does not fit either.
    """
    tried = list(_tried(run, now, estimating, sharding, {}))
    fitting = [change for change in tried if change.estimate.fits]
    if not fitting and tried:
        best = min(tried, key=lambda change: change.estimate.peak)
        changed = with_settings(run, best.values)
        assert changed is not None  # it was tried
        more = _tried(changed, best.estimate, estimating, best.sharding, best.values)
        fitting = [change for change in more if change.estimate.fits]
    return min(fitting, key=lambda change: change.estimate.seconds, default=None)


def _tried(run: Run, now: Estimate, estimating: Estimating, sharding: str, before: dict[str, Any]) -> Iterator[Change]:
    """Single changes of `run`, which has those of `before` already."""
    for values, how in _single(run, now, sharding):
        changed = with_settings(run, values)
        found = estimating(changed, how) if changed is not None else None
        if found is not None:
            yield Change(before | values, found, how)


def _single(run: Run, now: Estimate, sharding: str) -> Iterator[tuple[dict[str, Any], str]]:
    training = run.training
    evaluating = now.phases.get("evaluation", 0) == now.peak
    if evaluating:
        for size in _sizes(training.evaluation_batch_size, now, "evaluation"):
            yield {"training.evaluation_batch_size": size}, sharding
    for size in _sizes(now.work.shape[0], now, "training step"):
        yield {"training.micro_batch_size": size}, sharding
    if not training.gradient_checkpointing:
        yield {"training.gradient_checkpointing": True}, sharding
    if now.machine.kind == "cpu" and training.allocator == "system":
        yield {"training.allocator": "tight"}, sharding
    if run.backbone.dtype == "float32":
        yield {"backbone.dtype": "bfloat16"}, sharding
    if getattr(run.backbone, "quantization", False) is None:
        yield {"backbone.quantization": {"kind": "nf4"}}, sharding
    if now.machine.count > 1 and sharding != "fsdp2":
        yield {}, "fsdp2"
    if run.task.max_length > SHORTEST:
        yield {"task.max_length": run.task.max_length // 2}, sharding


def _sizes(rows: int, now: Estimate, phase: str) -> Iterator[int]:
    """The largest half, quarter … of the rows that may fit, if memory beside weights goes with them, and the next."""
    static = now.parts.get("weights", 0) + now.parts.get("optimizer", 0) + now.parts.get("libraries", 0)
    moving = max(now.phases.get(phase, now.peak) - static, 1)
    sizes = list(_halves(rows))
    likely = [size for size in sizes if static + moving * size / rows <= now.limit]
    yield from likely[:2] or sizes[-1:]


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def with_settings(run: Run, settings: dict[str, Any]) -> Run | None:
    """The run with `section.key` set; None where that is no valid run."""
    tree = run.model_dump(mode="json")
    for name, value in settings.items():
        *path, last = name.split(".")
        at = tree
        for part in path:
            at[part] = at.get(part) or {}
            at = at[part]
        at[last] = value
    try:
        return Run.model_validate(tree)
    except ValueError:
        return None


def _typed(value: object) -> str:
    """As YAML reads it on the command line."""
    return json.dumps(value).replace('"', "")
