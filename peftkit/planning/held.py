"""What a model holds and does in a step of training and a batch of evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.planning.ledger import Operation


@dataclass(frozen=True)
class Trace:
    """What a model holds and does, in bytes of tensors; without the optimizer's state."""

    weights: int
    """Parameters and buffers."""
    trained: int
    """Bytes of the parameters that train, which their gradients take too."""
    trained_parameters: int
    parameters: int
    largest_trained: int
    """Numbers in the largest parameter that trains."""
    kept: int
    """Alive at the end of the forward pass beside the weights: what the backward pass needs."""
    peaks: dict[str, int]
    """The most alive in each phase of a step, weights included."""
    evaluation: int
    """The most alive in a batch of an evaluation, weights included."""
    step: Counter[Operation]
    """Of the first micro-batch."""
    predict: Counter[Operation]
    """Of the batch of an evaluation."""
    state: int
    """Bytes that the optimizer keeps from step to step."""
    largest_block: int
    """Bytes of the weights of the largest block, which sharding gathers."""
    blocks: int

    @property
    def peak(self) -> int:
        """The most alive in a step."""
        return max(self.peaks.values(), default=self.weights)

    def with_blocks(self, smaller: Trace, blocks: int) -> Trace:
        """What a model of `blocks` blocks would hold, given this one and a `smaller` one.

        Every block adds the same, so that what is alive at a place of the step is linear in their number.
        """
        apart, more = self.blocks - smaller.blocks, blocks - self.blocks

        def grown(large: int, small: int) -> int:
            return large + (large - small) // apart * more

        fields = ("state", "weights", "trained", "trained_parameters", "parameters", "kept", "evaluation")
        sizes: dict[str, Any] = {name: grown(getattr(self, name), getattr(smaller, name)) for name in fields}
        peaks = {phase: grown(peak, smaller.peaks[phase]) for phase, peak in self.peaks.items()}
        step, predict = (
            Counter({one: grown(times, small[one]) for one, times in large.items()})
            for large, small in ((self.step, smaller.step), (self.predict, smaller.predict))
        )
        return replace(self, **sizes, peaks=peaks, step=step, predict=predict, blocks=blocks)
