"""A plain model without its top blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import Layout, block_modules
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

PER_BLOCK = "layer_types"
"""The end of the names of settings that have an entry for each block."""


def check_blocks(model: nn.Module, layout: Layout, dropped: int) -> None:
    """Refuse to leave out what cannot be left out.

    Raises:
        UsageError: all blocks, or blocks that are no plain list.
    """
    blocks = len(_stack(model, layout))
    if dropped >= blocks:
        raise UsageError(f"--drop-layers {dropped}: the model has {blocks} blocks, of which one at least has to stay")


def drop_blocks(model: Any, layout: Layout, dropped: int) -> None:
    """Leave out the top blocks, in place; the configuration says how many are left.

    Names stay as they are, because blocks are numbered from below.
    """
    stack = _stack(model, layout)
    kept = len(stack) - dropped
    del stack[kept:]
    for name, value in list(vars(model.config).items()):
        if name.endswith(PER_BLOCK) and value is not None:
            setattr(model.config, name, value[:kept])
    model.config.num_hidden_layers = kept


def _stack(model: Any, layout: Layout) -> Any:
    """The list of the blocks.

    Raises:
        UsageError: there are two, or its blocks are used more than once.
    """
    places = dict.fromkeys(name.rpartition(".")[0] for name in block_modules(model, layout))
    stacks = [model.get_submodule(place) for place in places]
    kind = model.config.model_type
    if len(stacks) != 1:
        raise UsageError(f"--drop-layers is for models with one list of blocks, and '{kind}' has {len(stacks)}")
    if len(stacks[0]) != model.config.num_hidden_layers:
        raise UsageError(f"--drop-layers: '{kind}' goes through its blocks more than once, so none can be left out")
    return stacks[0]
