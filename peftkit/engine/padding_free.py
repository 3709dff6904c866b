"""Lets a model compute the real tokens of padded batches only; what goes in and comes out stays as it was.

Hooks at the pretrained part of a model put a batch into one row, and its hidden states back into a batch, so that
neither tasks nor heads know of it. Which tokens of the row belong together goes with the arguments that transformers
hands down to attention functions, so that a block that is computed again in the backward pass has it too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.modules import architecture, base_model
from peftkit.errors import BackboneError, MethodError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.engine.unpadded import Unpadded

UNPADDED = "unpadded"
"""The argument that says how a row is to be read; also the attribute of a model that computes without padding."""
WORTH = 0.97
"""Where a larger share of a batch is real, it goes as it is."""
LAYERS = {"full_attention", "sliding_attention"}
BY_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
WHOLE = ("past_key_values", "encoder_hidden_states", "use_cache", "output_attentions", "output_hidden_states")
"""Arguments that ask for what a row does not give."""


@contextlib.contextmanager
def without_padding(model: nn.Module) -> Iterator[str]:
    """`model` computing real tokens only, and afterwards as it was; yields why it cannot, or nothing."""
    from peftkit.backbones.attention import close_seam, is_open, open_seam

    base = pretrained(model)
    reason = why_not(base)
    if reason or hasattr(base, UNPADDED):
        yield reason
        return
    closed = [module for module in attending(base).values() if not is_open(module)]
    hooks = _Hooks(base)
    setattr(base, UNPADDED, hooks)
    try:
        for module in closed:
            open_seam(module)
        yield ""
    finally:
        delattr(base, UNPADDED)
        hooks.remove()
        for module in filter(is_open, closed):
            close_seam(module)


@contextlib.contextmanager
def padded(model: nn.Module) -> Iterator[None]:
    """`model` computing whole batches for a while, padding included."""
    hooks = getattr(pretrained(model), UNPADDED, None)
    if hooks is None:
        yield
        return
    hooks.paused = True
    try:
        yield
    finally:
        hooks.paused = False


def is_unpadded(model: nn.Module) -> bool:
    """Whether `model` computes real tokens only."""
    return hasattr(pretrained(model), UNPADDED)


def pretrained(model: nn.Module) -> nn.Module:
    """The pretrained part of a model, whatever it is wrapped in."""
    from transformers import PreTrainedModel

    return base_model(next(part for part in model.modules() if isinstance(part, PreTrainedModel)))


def why_not(base: Any) -> str:
    """Why the tokens of several examples cannot stand in one row of an architecture; empty where they can."""
    name = architecture(base)
    if base.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if reason := why_closed(base):
        return reason
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{name} counts positions inside attention"
    if others := sorted(set(getattr(base.config, "layer_types", None) or ()) - LAYERS):
        return f"{name} has layers of type {others[0]}"
    if hasattr(base, "pooler_activation") and base.pooler is not None:
        return f"{name} has a pooler that takes the first tokens by itself"
    return ""


def why_closed(base: Any) -> str:
    """Why an architecture cannot be given another function to attend by; empty where it can."""
    from peftkit.backbones.attention import IMPLEMENTATIONS, is_by_hand

    name = architecture(base)
    try:
        found = attending(base)
    except (BackboneError, MethodError):
        return f"{name} does not attend through transformers' attention functions"
    if any(map(is_by_hand, found.values())):
        return f"{name} computes its attention scores by itself"
    if (implementation := base.config._attn_implementation) not in IMPLEMENTATIONS:
        return f"{name} attends by '{implementation}'"
    return ""


def makes_code(base: Any) -> bool:
    """Whether a model's products are by code that is made for each shape, which takes a millisecond or more: CPUs
    multiply half precision so, through oneDNN."""
    return bool(base.device.type == "cpu" and base.dtype.itemsize == 2)


def attending(base: Any) -> dict[str, nn.Module]:
    """The modules that attend, by name.

    Raises:
        BackboneError, MethodError: it is not known which, or how.
    """
    from peftkit.backbones import attention

    return attention.attending(base, layout_for(base.config.model_type))


class _Hooks:
    """What stands before and behind the pretrained part of a model, and before its pooler."""

    def __init__(self, base: Any) -> None:
        self.names = list(inspect.signature(base.forward).parameters)
        self.window = _window(base.config)
        self.is_even = makes_code(base)
        self.current: Unpadded | None = None
        self.paused = False
        self.read: Tensor | None = None
        self.handles = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if getattr(base, "pooler", None) is not None:
            self.handles.append(base.pooler.register_forward_pre_hook(self._pool))

    def remove(self) -> None:
        """Take them out again."""
        for handle in self.handles:
            handle.remove()

    def _enter(
        self, base: Any, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        given = dict(zip(self.names, inputs, strict=False)) | named
        self.current = None if self.paused else self._row_of(given)
        if self.current is None:
            return None
        own = given.get("position_ids")
        given["position_ids"] = positions(base, given) if own is None else own.expand(given["attention_mask"].shape)
        if self.read is not None and self.read.shape == given["attention_mask"].shape:
            self.current.keep(self.read)
        for name in BY_TOKEN:
            if given.get(name) is not None:
                given[name] = self.current.row(given[name])
        # a mask of four dimensions is taken for a ready one, and none is made
        mask = given["attention_mask"].new_ones(1, 1, 1, 1, dtype=bool)
        return (), given | {"attention_mask": mask, "use_cache": False, UNPADDED: self.current}

    def _row_of(self, given: dict[str, Any]) -> Unpadded | None:
        """How a batch goes into a row; None where it does not, or where that would gain nothing."""
        from peftkit.engine.unpadded import Unpadded

        mask, tokens = given.get("attention_mask"), given.get("input_ids", given.get("inputs_embeds"))
        if mask is None or tokens is None or mask.ndim != 2 or mask.shape != tokens.shape[:2]:
            return None
        known = {*BY_TOKEN, "attention_mask", *WHOLE, "return_dict"}
        if any(given.get(name) for name in WHOLE) or given.get("return_dict") is False:
            return None
        if any(value is not None for name, value in given.items() if name not in known):
            return None
        if not mask[:, 0].all() or (mask.diff(dim=1) > 0).any() or mask.sum() > WORTH * mask.numel():
            return None
        row = Unpadded(mask, self.is_even)
        return None if self.window is not None and row.lengths[0] > self.window else row

    def _leave(self, base: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        row, self.current = self.current, None
        if row is not None and output is not None:
            output.last_hidden_state = row.batch(output.last_hidden_state)
        return output

    def _pool(self, pooler: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Poolers look at the first token of each example."""
        if self.current is None:
            return inputs
        hidden, *others = inputs
        return (self.current.first(hidden), *others)


def positions(base: Any, given: dict[str, Any]) -> Tensor:
    """(examples, tokens): the positions that the model itself gives to the tokens of a padded batch."""
    import torch

    mask, start = given["attention_mask"], 0
    embeddings: Any = getattr(base, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        if given.get("input_ids") is not None:
            own: Tensor = embeddings.create_position_ids_from_input_ids(given["input_ids"], embeddings.padding_idx)
            return own
        start = embeddings.padding_idx + 1
    return torch.arange(start, start + mask.shape[1], device=mask.device).expand(mask.shape)


def _window(config: Any) -> int | None:
    """The most tokens that all see each other in layers that see neighbours only; None where there are none."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if kinds is None or "sliding_attention" in kinds else None
