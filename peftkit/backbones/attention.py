"""The one seam into attention: between a model's projections and the function that attends with them.

A `BeforeAttention` inside an attention module whose seam is open changes the queries, keys, values and mask that the
module attends with. That is after the keys went into the cache, so whatever is added here never enters a cache.
Everything else, masks and caches included, stays as transformers made it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from peftkit.backbones.attention_inputs import Attention, changed, is_plain
from peftkit.backbones.layouts import Layout, in_blocks
from peftkit.backbones.modules import architecture
from peftkit.backbones.targets import Target, find_targets
from peftkit.errors import MethodError

NAME = "peftkit"
"""What transformers' registry of attention functions knows the seam by."""
OWN = "own_attention"
"""Attribute of an attention module: what may attend in place of torch's function, or return None."""
IN_ROW = "attention_in_row"
"""The same for examples that stand in a row, as they stand there; otherwise they are padded to each other."""
IMPLEMENTATIONS = ("sdpa", "eager")
BY_HAND = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("deberta", "deberta_v2", "mpnet"))
"""Where attention does not ask the registry; `attention_by_hand` knows how it goes."""


@dataclass(frozen=True)
class AttentionModule:
    """A module that attends, and how wide its keys and values are, all heads together."""

    name: str
    kind: str
    """The name with stars for numbers: encoder, decoder and cross attention differ."""
    key_width: int
    value_width: int


def attention_modules(model: nn.Module, layout: Layout) -> list[AttentionModule]:
    """The modules of the blocks that attend, in model order; a shared one (ALBERT's) once.

    Raises:
        MethodError: there are none that the layout knows, or it is not known how they attend.
    """
    keys, values = (find_targets(model, layout, role) for role in ("key", "value"))
    return [
        AttentionModule(name, re.sub(r"\b\d+\b", "*", name), _width(keys, name), _width(values, name))
        for name in attending(model, layout)
    ]


def attending(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """The modules of the blocks that attend by name, in model order, whatever was attached to the model.

    Raises:
        MethodError: there are none that the layout knows, or it is not known how they attend.
    """
    config: Any = model.config
    # the layers of a decoder without an encoder have cross attention too, which is never called
    paths = layout.attention if config.is_encoder_decoder else layout.attention[:1]
    inside = in_blocks(layout)
    matches = ((name, part, inside.search(name)) for name, part in model.named_modules())
    found = {name: part for name, part, match in matches if match and match["path"] in paths}
    if not found:
        raise MethodError(
            f"{architecture(model)} has no attention modules that its row in peftkit/backbones/layouts.py names; "
            "add their paths there"
        )
    for name in found:
        _check_seam(model, name)
    return found


def open_seam(module: nn.Module) -> None:
    """Let the `BeforeAttention` children of an attention module, if any, change what it attends with, and examples
    share a row.

    The model's configuration is left alone: masks are made as before, and nothing of this is saved with it.

    Raises:
        MethodError: the model attends by a function that takes no mask of every query and key.
    """
    attention: Any = module
    if is_by_hand(module):
        from peftkit.backbones.attention_by_hand import OPEN

        attention.__class__ = OPEN.get(type(module), type(module))
    elif not is_open(module):
        AttentionInterface.register(NAME, attend)
        attention.model_config = attention.config
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = NAME  # the public setter would reach into shared sub-configs
        _own_function(attention)


def is_open(module: nn.Module) -> bool:
    """Whether `attend` is what the module attends by."""
    return hasattr(module, "model_config")


def close_seam(module: nn.Module) -> None:
    """Undo `open_seam` for a module that asks the registry."""
    attention: Any = module
    attention.config = attention.model_config
    del attention.model_config


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of modules whose seam is open: the model's own, after the `BeforeAttention` children.

    With `unpadded` among the options, a row of examples attends each to itself, and there is no other mask.

    Raises:
        MethodError: the model was switched to a function that takes no mask of every query and key.
    """
    implementation, function = _own_function(module)
    unpadded = options.pop("unpadded", None)
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)

    def own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hides = implementation == "sdpa" and mask is None and query.shape[2] > 1 and causal
        given = changed(module, Attention(query, key, value, mask, options.get("position_bias"), hides))
        if implementation == "sdpa" and (instead := getattr(module, OWN, None)) is not None:
            context = instead(given, options.get("dropout", 0.0), options.get("scaling"))
            if context is not None:
                return context, None
        bias = {} if given.position_bias is None else {"position_bias": given.position_bias}
        result: tuple[Tensor, Tensor | None] = function(module, *given[:4], **options | bias)
        return result

    if unpadded is None:
        return own(query, key, value, attention_mask)
    in_row = getattr(module, IN_ROW, None)
    if implementation == "sdpa" and in_row is not None and options.get("position_bias") is None and is_plain(module):
        context = in_row(unpadded, query, key, value, causal, options.get("dropout", 0.0), options.get("scaling"))
        if context is not None:
            return context, None
    additive = implementation == "eager"
    return unpadded.attended(lambda *given: own(*given)[0], query, key, value, causal, additive), None


def _own_function(module: Any) -> tuple[str, Callable[..., Any]]:
    """The name and the function by which the module would attend without the seam."""
    implementation = module.model_config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise MethodError(
            f"{type(module).__name__} attends by '{implementation}', which takes no mask of every query and key, and "
            "what is added needs one; load the model with attn_implementation='sdpa'"
        )
    # transformers defines the eager function, and sometimes a registry of its own, beside each architecture
    names = _forward_of(module).__globals__
    found = names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, names["eager_attention_forward"])
    return implementation, found


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _calls_registry(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _forward_of(module).__code__.co_names


def _check_seam(model: nn.Module, name: str) -> None:
    module, reason = model.get_submodule(name), ""
    if not is_by_hand(module) and not _calls_registry(module):
        reason = "computes its scores by itself"
    if getattr(module, "talking_head", False):
        reason = "mixes its heads (talking_head)"
    if reason:
        raise MethodError(
            f"{architecture(model)} does not attend through transformers' attention functions: '{name}' {reason}, and "
            "nothing can be added to its keys and values; choose another method or backbone"
        )


def is_by_hand(module: nn.Module) -> bool:
    return any(kind.__module__ in BY_HAND for kind in type(module).__mro__)


def _width(targets: list[Target], name: str) -> int:
    return next(target.outputs for target in targets if target.name.startswith(f"{name}."))
