"""Fused projections as separate linear layers, so that one role alone can be adapted, and back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbones.layouts import Layout, in_blocks
from peftkit.backbones.quantize import is_quantized, rows_of
from peftkit.backbones.targets import Target, part_widths
from peftkit.errors import MethodError


class SplitProjection(nn.Module):
    """One linear layer a role, whose outputs are put together as the fused projection's were."""

    def __init__(self, fused: nn.Module, widths: Mapping[str, int], heads: int | None) -> None:
        """`widths` are the outputs of each role, in order; with `heads` they alternate head by head."""
        super().__init__()
        self.roles, self.heads, self.transposed = tuple(widths), heads, isinstance(fused, Conv1D)
        rows = torch.arange(sum(widths.values()))
        if heads:
            places = [part.flatten() for part in rows.view(heads, len(widths), -1).unbind(1)]
        else:
            places = list(rows.split(list(widths.values())))
        self._order = torch.cat(places).argsort()
        for role, place in zip(widths, places, strict=True):
            self.add_module(role, rows_of(fused, place) if is_quantized(fused) else _outputs(fused, place))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = [self.get_submodule(role)(inputs) for role in self.roles]
        if not self.heads:
            return torch.cat(parts, dim=-1)
        return torch.stack([part.unflatten(-1, (self.heads, -1)) for part in parts], dim=-2).flatten(-3)

    @property
    def outputs(self) -> int:
        """Of all roles together."""
        return len(self._order)

    def rows_of(self, role: str) -> Tensor:
        """Which outputs of the fused projection are a role's."""
        widths = [self._of(one, "out_features") for one in self.roles]
        return self._order.argsort().split(widths)[self.roles.index(role)]

    @property
    def weight(self) -> Tensor:
        """The fused matrix, (outputs, inputs); DeBERTa reads it."""
        return torch.cat([self._of(role, "weight") for role in self.roles])[self._order]

    def fused(self) -> nn.Module:
        """The projection as it was, with the weights of the parts."""
        weight = self.weight
        outputs, inputs = weight.shape
        has_bias = self._of(self.roles[0], "bias") is not None
        whole: Any = Conv1D(outputs, inputs) if self.transposed else nn.Linear(inputs, outputs, has_bias, device="meta")
        whole.weight = _like(self._of(self.roles[0], "weight"), weight.T if self.transposed else weight)
        if has_bias:
            bias = torch.cat([self._of(role, "bias") for role in self.roles])[self._order]
            whole.bias = _like(self._of(self.roles[0], "bias"), bias)
        return whole

    def _of(self, role: str, name: str) -> Any:
        return getattr(self.get_submodule(role), name)


def split_fused(model: nn.Module, layout: Layout, targets: Iterable[Target]) -> None:
    """Replace every fused projection that a target is a part of by a `SplitProjection`.

    The function stays the same up to rounding; `fuse` puts the projections back.

    Raises:
        MethodError: a projection that is neither plain nor quantised by peftkit.
    """
    inside = in_blocks(layout)
    for name in dict.fromkeys(target.fused_in for target in targets if target.fused_in):
        module = model.get_submodule(name)
        if type(module) not in (nn.Linear, Conv1D) and not is_quantized(module):
            raise MethodError(
                f"'{name}' is a {type(module).__name__}, which cannot be adapted in part; target the whole '{name}'"
            )
        match = inside.search(name)
        assert match is not None
        fused = layout.fused[match["path"]]
        outputs: Any = module.nf if isinstance(module, Conv1D) else module.out_features
        widths = part_widths(fused, outputs, model)
        config: Any = model.config
        heads = config.num_attention_heads if fused.by_head else None
        model.set_submodule(name, SplitProjection(module, widths, heads))


def fuse(model: nn.Module) -> nn.Module:
    """Undo `split_fused` in a model whose parts are plain linear layers (again)."""
    for name, part in [one for one in model.named_modules() if isinstance(one[1], SplitProjection)]:
        model.set_submodule(name, part.fused())
    return model


def _outputs(fused: nn.Module, place: Tensor) -> nn.Linear:
    """The linear layer of some outputs of a plain projection."""
    weight: Any = fused.weight
    bias: Any = fused.bias
    transposed = isinstance(fused, Conv1D)
    part = nn.Linear(weight.shape[0 if transposed else 1], len(place), bias is not None, device="meta")
    place = place.to(weight.device)
    part.weight = _like(weight, weight.data[:, place].T if transposed else weight.data[place])
    if bias is not None:
        part.bias = _like(bias, bias.data[place])
    return part


def _like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=parameter.requires_grad)
