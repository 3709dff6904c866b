"""Lets the last block of a model compute what it adds to hidden states only where those are read.

Its keys and values are of all tokens. The block is given the tokens that are read; what comes first in it is given all
of them instead, and what projects attention's result, only what belongs to the former.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.modules import architecture
from peftkit.engine.padding_free import UNPADDED, pretrained, why_not

if TYPE_CHECKING:
    from torch import Tensor, nn

LAST = "last_block"
"""Attribute of a model whose last block computes what is read."""
FIRST_TOKEN = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Architectures whose head for texts reads the first token, and no other."""
KNOWN = (*FIRST_TOKEN, "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox")
NORMS = ("input_layernorm",)
"""Names of the normalisation that stands between a block's input and its attention."""


@contextlib.contextmanager
def read_only(model: nn.Module) -> Iterator[None]:
    """`model` whose last block heeds what `reading` says, where it can; afterwards it is as it was."""
    base: Any = pretrained(model)
    if hasattr(base, LAST) or why_not(base) or why_whole(base):
        yield
        return
    hooks = _Hooks(base)
    setattr(base, LAST, hooks)
    try:
        yield
    finally:
        delattr(base, LAST)
        hooks.remove()


@contextlib.contextmanager
def reading(model: nn.Module, read: Tensor) -> Iterator[None]:
    """Promise that of the outputs of a forward pass nothing is read but what `read` (examples, tokens) is true of."""
    base: Any = pretrained(model)
    if not hasattr(base, LAST) or not hasattr(base, UNPADDED):
        yield
        return
    row_hooks = getattr(base, UNPADDED)
    row_hooks.read = read
    try:
        yield
    finally:
        row_hooks.read = None


@contextlib.contextmanager
def reading_texts(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """The same of a classifier of texts, whose attention mask this is."""
    if pretrained(model).config.model_type not in FIRST_TOKEN:  # type: ignore[union-attr, operator]
        yield
        return
    first = mask.clone().bool()
    first[:, 1:] = False
    with reading(model, first):
        yield


def why_whole(base: Any) -> str:
    """Why the last block of an architecture that computes no padding computes all tokens; empty where it need not."""
    from torch.distributed.fsdp import FSDPModule

    if base.config.model_type not in KNOWN:
        return f"it is not known what the last block of {architecture(base)} may leave out"
    # those of `fully_shard` gather weights, and change nothing
    parts = [part for part in _last(base).modules() if not isinstance(part, FSDPModule)]
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "something was added to the modules of the last block"
    return ""


def _last(base: Any) -> nn.Module:
    return list(block_modules(base, layout_for(base.config.model_type)).values())[-1]


class _Hooks:
    """What stands before the last block, before what comes first in it, and before attention's output projection."""

    def __init__(self, base: Any) -> None:
        layout, block = layout_for(base.config.model_type), _last(base)
        norm = next((getattr(block, name) for name in NORMS if hasattr(block, name)), None)
        first = block.get_submodule(layout.attention[0]) if norm is None else norm
        self.read: Tensor | None = None
        self.given: Tensor | None = None
        self.handles = [
            block.register_forward_pre_hook(self._narrow, with_kwargs=True),
            first.register_forward_pre_hook(self._widen, with_kwargs=True),
            block.get_submodule(layout.roles["output"][0]).register_forward_pre_hook(self._select),
            block.register_forward_hook(self._forget, always_call=True),
        ]

    def remove(self) -> None:
        """Take them out again."""
        for handle in self.handles:
            handle.remove()

    def _narrow(self, block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        row = named.get(UNPADDED)
        if row is not None and block.training and getattr(block, "gradient_checkpointing", False):
            row.read = None  # these hooks would not run when the block is computed again
        self.read = None if row is None else row.read
        if self.read is None:
            return None
        self.given, (hidden, *others) = inputs[0], inputs
        return (hidden.index_select(1, self.read), *others), named

    def _widen(self, part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.read is None:
            return None
        if "hidden_states" in named:
            return inputs, named | {"hidden_states": self.given}
        return (self.given, *inputs[1:]), named

    def _select(self, part: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return inputs if self.read is None else (inputs[0].index_select(1, self.read), *inputs[1:])

    def _forget(self, *_: Any) -> None:
        self.read = self.given = None
