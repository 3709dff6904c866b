"""Training that runs out of memory: what to change, or smaller micro-batches that give the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from peftkit.errors import TrainingError
from peftkit.training.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from peftkit.config import TrainingSettings

Result = TypeVar("Result")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's errors say on GPUs and CPUs."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
    )


def retried(
    work: Callable[[int], Result], size: int, settings: TrainingSettings, undo: Callable[[], None], step: int
) -> tuple[Result, int]:
    """`work` with micro-batches of `size` examples, and with half as many as long as memory does not suffice.

    Args:
        undo: takes back what an attempt left; every attempt draws the same random numbers.
        step: named in errors.

    Returns:
        The result, and the size that worked.

    Raises:
        TrainingError: there is not enough memory, and nothing may or can be split.
    """
    splits = settings.on_out_of_memory == "split"
    drawn = random_state() if splits else None
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if not splits or size == 1:
                raise TrainingError(_advice(step, size, settings)) from error
        # here, where the error no longer holds on to the tensors of the attempt
        undo()
        _empty_cache()
        restore_random_state(drawn)  # type: ignore[arg-type]
        size = -(-size // 2)


def _advice(step: int, size: int, settings: TrainingSettings) -> str:
    ways = [f"lower training.micro_batch_size (micro-batches have {size} examples)"] if size > 1 else []
    if size > 1 and settings.on_out_of_memory == "stop":
        ways.append("set training.on_out_of_memory: split")
    if not settings.gradient_checkpointing:
        ways.append("set training.gradient_checkpointing: true")
    ways += ["lower task.max_length", "hold the backbone in fewer bits (backbone.dtype, backbone.quantization)"]
    return f"out of memory at step {step:,}: {', '.join(ways[:-1])}, or {ways[-1]}; `peftkit plan` says what fits"


def _empty_cache() -> None:
    import torch

    cuda: Any = torch.cuda
    if cuda.is_available():
        cuda.empty_cache()
