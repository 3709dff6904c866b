"""peft's LoRA layers, computed together where they are given the same input.

Only their `forward` is replaced, and only what is plain LoRA, or DoRA without dropout, takes the way of
`engine/lora.py`; whatever else a layer is asked for (merged, disabled, another variant, several adapters) is peft's to
compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from types import NoneType
from typing import Any, get_args

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbones.layouts import Layout, in_blocks, roles_by_path
from peftkit.backbones.quantize import is_quantized
from peftkit.engine.dora import Magnitude
from peftkit.engine.dropout import Draw
from peftkit.engine.lora import Projection, project

Layer = Linear | Linear4bit | Linear8bitLt


@contextlib.contextmanager
def fused_lora(model: nn.Module, layout: Layout, draw: Draw) -> Iterator[None]:
    """Let the LoRA layers of a model be computed in groups.

    Args:
        draw: what draws the masks of LoRA's dropout.
    """
    groups = [(model.get_submodule(parent), _Group(layers, draw)) for parent, layers in lora_groups(model, layout)]
    handles = [
        parent.register_forward_hook(group.forget, always_call=True)
        for parent, group in groups
        if len(group.layers) > 1
    ]
    layers = [layer for _, group in groups for layer in group.layers]
    for _, group in groups:
        for index, layer in enumerate(group.layers):
            layer.forward = partial(group.forward, index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.forward


def lora_groups(model: nn.Module, layout: Layout) -> list[tuple[str, list[Layer]]]:
    """The LoRA layers that are given the same input, with the name of the module that they are children of.

    They are queries, keys and values, gate and up; in cross attention, keys and values.
    """
    roles, inside = roles_by_path([layout]), in_blocks(layout)
    groups: dict[tuple[str, str], list[Layer]] = {}
    layer: Any
    for name, layer in model.named_modules():
        if type(layer) not in get_args(Layer):
            continue
        match, parent = inside.search(name), name.rpartition(".")[0]
        path = match["path"] if match else ""
        groups.setdefault((parent, _input_of(path, layout, roles) or name), []).append(layer)
    return [(parent, layers) for (parent, _), layers in groups.items()]


def _input_of(path: str, layout: Layout, roles: dict[str, tuple[str, ...]]) -> str:
    """A name for what the projection at `path` is given; "" for what no other is given."""
    parent = path.rpartition(".")[0]
    if parent in layout.fused:
        return "whole"
    role = roles.get(path, ())
    is_crossed = parent in layout.attention[1:]
    if role in (("query",), ("key",), ("value",)) and not (is_crossed and role == ("query",)):
        return "attended"
    return "widened" if role in (("gate",), ("up",)) else ""


class _Group:
    """Layers of one parent. The first that is called computes all, and the others find their outputs here."""

    def __init__(self, layers: Sequence[Layer], draw: Draw) -> None:
        self.layers, self._draw = layers, draw
        self._magnitudes = {layer: Magnitude() for layer in layers}
        self._given: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def forward(self, index: int, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer of this index computes."""
        layer = self.layers[index]
        dropout = _plain_dropout(layer, inputs) if not args and not kwargs else None
        if dropout is None:
            original: Any = type(layer).forward
            output: Tensor = original(layer, inputs, *args, **kwargs)
            return output
        given = (inputs, inputs._version, torch.is_grad_enabled())
        if self._outputs:
            if index in self._outputs and self._is_given(given):
                return self._taken(index)
            return self._computed([layer], inputs, dropout)[0]
        members = [
            number
            for number, one in enumerate(self.layers)
            if number == index or _plain_dropout(one, inputs) == dropout
        ]
        found = self._computed([self.layers[number] for number in members], inputs, dropout)
        self._outputs = dict(zip(members, found, strict=True))
        self._given = given
        return self._taken(index)

    def _taken(self, index: int) -> Tensor:
        """The output of a layer; with the last one the input is let go, which would else live until the next batch."""
        output = self._outputs.pop(index)
        if not self._outputs:
            self._given = ()
        return output

    def forget(self, *_: Any) -> None:
        """Drop what nobody asked for, at the end of the parent's forward pass."""
        self._given, self._outputs = (), {}

    def _is_given(self, given: tuple[Any, ...]) -> bool:
        return self._given[0] is given[0] and self._given[1:] == given[1:]

    def _computed(self, layers: Sequence[Layer], inputs: Tensor, dropout: float) -> tuple[Tensor, ...]:
        projections = [_projection(layer) for layer in layers]
        outputs = project(inputs, projections, dropout, self._draw)
        return tuple(map(self._finished, layers, projections, outputs))

    def _finished(self, layer: Layer, projection: Projection, output: Tensor) -> Tensor:
        """The output of a layer, of that of its projection."""
        name = _active(layer)[0]
        if name not in layer.lora_variant:
            return output
        dora: Any = layer.lora_magnitude_vector[name]
        base: Any = layer.base_layer
        low = (projection.down, projection.up, projection.scale)
        return self._magnitudes[layer].scaled(output, dora.weight, base.weight, base.bias, low)


def _plain_dropout(layer: Layer, inputs: Tensor) -> float | None:
    """The probability of dropout of a layer that computes plain LoRA, or DoRA without dropout, in the dtype of its
    input; None for others."""
    base, active = layer.base_layer, _active(layer)
    if layer.disable_adapters or layer.merged or len(active) != 1 or not layer.cast_input_dtype_enabled:
        return None
    name = active[0]
    variant = layer.lora_variant.get(name)
    if (
        layer.lora_bias[name]
        or not (type(base) in (nn.Linear, Conv1D) or is_quantized(base))
        or type(variant) not in (NoneType, DoraLinearVariant)
    ):
        return None
    dropout: Any = layer.lora_dropout[name]
    parts = (base, layer.lora_A[name], layer.lora_B[name], dropout)
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    # sums over tokens, of scaled gradients at that, would leave the range of float16
    if inputs.dtype == torch.float16 or _multiplies_in(base) not in (inputs.dtype, None):
        return None
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if trains or torch.is_autocast_enabled(inputs.device.type):
        return None
    rate = 0.0 if isinstance(dropout, nn.Identity) or not dropout.training else float(dropout.p)
    # with dropout, peft's DoRA gives W what is left of the input, too
    return None if variant is not None and (rate or type(base) is not nn.Linear) else rate


def _multiplies_in(base: Any) -> torch.dtype | None:
    """The dtype of a frozen layer's products; None for that of whatever it is given."""
    found: torch.dtype | None = base.compute_dtype if is_quantized(base) else base.weight.dtype
    return found


def _projection(layer: Layer) -> Projection:
    name = _active(layer)[0]
    base: Any = layer.base_layer
    down: Any = layer.lora_A[name]
    up: Any = layer.lora_B[name]
    # DoRA adds the bias to what it has scaled
    bias = None if name in layer.lora_variant else base.bias
    weight = base if is_quantized(base) else base.weight
    return Projection(weight, bias, down.weight, up.weight, layer.scaling[name], isinstance(base, Conv1D))


def _active(layer: Layer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
