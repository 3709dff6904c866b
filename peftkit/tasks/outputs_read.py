"""A language model's outputs where they are read, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftkit.engine.last_block import reading
from peftkit.tasks.generation import unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn


def logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Logits (items, vocabulary) at `positions` (examples, tokens; true where wanted); no others are computed."""
    return logits_at_places(model, inputs, positions.flatten().nonzero().squeeze(1), positions.shape[1])


def logits_at_places(model: nn.Module, inputs: dict[str, Any], places: Tensor, width: int) -> Tensor:
    """Logits (items, vocabulary) at places of the flattened outputs, which are `width` long."""
    with output_only_at(model, inputs, places, width) as seen:
        logits: Tensor = model(**inputs).logits
    return logits.flatten(0, -2) if seen else logits.flatten(0, 1)[places]


def _read(inputs: dict[str, Any], places: Tensor, width: int) -> Tensor:
    """(rows, width), true at places of the flattened outputs."""
    ids = inputs["input_ids"]
    read = ids.new_zeros(ids.shape[0] * width, dtype=bool)
    read[places] = True
    return read.view(-1, width)


@contextmanager
def output_only_at(
    model: Any,
    inputs: dict[str, Any],
    places: Tensor,
    width: int,
    instead: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Iterator[list[bool]]:
    """Let the output projection see only the hidden states at `places`; yields a list that stays empty if it saw none,
    as in models that project without a module.

    What is computed after it, such as a bias or a cap on logits, works on any number of positions.

    Args:
        instead: what it is given in their stead, (items, width).
    """
    projection = unwrapped(model).get_output_embeddings()
    seen: list[bool] = []

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        seen.append(True)
        before = hidden.shape[1] - width  # virtual tokens that the method put in front
        # as many examples of one position: what cuts virtual tokens off leaves those alone
        return (instead(hidden[:, before:].flatten(0, 1)[places]).unsqueeze(1), *others)

    handle = projection.register_forward_pre_hook(select) if projection is not None else None
    try:
        with reading(model, _read(inputs, places, width)):
            yield seen
    finally:
        if handle is not None:
            handle.remove()
