"""Bottleneck adapters: Houlsby et al. 2019, Pfeiffer et al. 2020 (MAD-X), and parallel ones (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.backbones.layouts import Layout, block_modules, layout_for
from peftkit.backbones.modules import architecture, norms
from peftkit.errors import MethodError, NotMergeable
from peftkit.methods.base import check_trained, module_parameters, numel, train_in_float32, train_only
from peftkit.methods.in_model import InModel

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.load import Backbone

REDUCTION_FACTOR = 16.0
PARALLEL_SCALING = 4.0


@dataclass(frozen=True)
class Site:
    """Where one adapter goes: modules by full name."""

    block: str
    adapted: str
    """The module whose output is changed; the adapter becomes its child."""
    given: str | None = None
    """The module whose input a parallel adapter reads."""
    is_norm: bool = False
    """`adapted` is the normalisation of input + result, and is computed again with the update added."""


class Bottleneck(InModel):
    """Adds s · (U f(D x + c) + b) in every block, with D (bottleneck × width) and U (width × bottleneck) in between.

    houlsby: x is the result z of self-attention, and again of the feed-forward network, and the update is added to z
    before the residual is. Two in each block, in a decoder with cross attention too.

    pfeiffer: one after the feed-forward network: LN(x + FFN(x) + update(h)) with h = LN(x + FFN(x)) where blocks are
    normalised at their end (BERT, BART), y + update(y) with y = x + FFN(x) where at their start (GPT-2, Llama, T5).

    parallel: one beside the feed-forward network: FFN(x) + update(x), where x has passed the block's normalisation.

    ALBERT's layers share one block, and so one adapter. Adapters are held in float32 whatever the backbone's dtype.
    """

    artifact: ClassVar[str] = "adapter"
    size: ClassVar[str | None] = "bottleneck_size"
    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    bottleneck_size: Annotated[int, Field(gt=0)] | None = None
    reduction_factor: Annotated[float, Field(ge=1)] | None = None
    """Width of the backbone / bottleneck size, which is rounded down; 16 where neither is given."""
    nonlinearity: Literal["relu", "gelu", "swish", "tanh"] = "relu"
    """Pfeiffer's and He's choice; Houlsby's code has gelu."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the bottleneck's activations."""
    scaling: Annotated[float, Field(gt=0)] | None = None
    """s above: 4 for parallel adapters and 1 for the others, unless it is given."""
    train_layernorm: bool = False
    """Also train the normalisations of the blocks that have adapters, as Houlsby et al. do."""
    layers: tuple[int, ...] | None = None
    """Blocks that get adapters, counted from 0 (in an encoder-decoder the decoder's follow the encoder's); all unless
    it is given. Leaving out the first ones is AdapterDrop (Rücklé et al. 2021). Also written `4+5`."""

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        if isinstance(value, str) and all(part.strip().isdecimal() for part in value.split("+")):
            return tuple(int(part) for part in value.split("+"))
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("layers")
    @classmethod
    def _some_layer(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value == ():
            raise ValueError("no layers, so nothing would be adapted; leave it out for all of them")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Bottleneck:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor say the same thing; give one of them")
        return self

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        model, heads = backbone.model, backbone.head_modules
        expected = self.added_parameters(model, backbone.layout)
        expected += self.tuned_parameters(model, heads) + module_parameters(model, heads)
        train_only(model, heads)
        train_in_float32(model, heads)
        self._add_adapters(model, backbone.layout)
        check_trained(model, expected, self)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        raise NotMergeable(
            f"method '{self.kind}' has no merged form: a nonlinearity stands between an adapter's two matrices, so no "
            "weight of the backbone can take them up; ship the run folder, which `peftkit predict` and "
            "`peftkit.load_run` read, or with its backbone as what `peftkit bundle RUN OUT` writes"
        )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Sites × (2 · width · bottleneck + bottleneck + width)."""
        width, size = _width(model), self._bottleneck_size(model)
        return len(list(self._sites(model, layout))) * (2 * width * size + size + width)

    def tuned_parameters(self, model: nn.Module, heads: tuple[str, ...]) -> int:
        """2 · width for each trained LayerNorm, width for an RMSNorm."""
        config: Any = model.config
        trained = self._trained_norms(model, layout_for(config.model_type, model))
        return sum(numel(p) for norm in trained for p in norm.parameters(recurse=False))

    def _bottleneck_size(self, model: nn.Module) -> int:
        width = _width(model)
        size = self.bottleneck_size or max(1, int(width // (self.reduction_factor or REDUCTION_FACTOR)))
        if size > width:
            raise MethodError(
                f"a bottleneck wider than the layer: {size} units where {architecture(model)} has {width}; "
                "lower method.bottleneck_size"
            )
        return size

    def _add_adapters(self, model: nn.Module, layout: Layout) -> None:
        from peftkit.methods.bottleneck_layers import BottleneckAdapter, add_adapter, train_norm

        sites = list(self._sites(model, layout))
        for norm in self._trained_norms(model, layout):
            train_norm(norm)
        width, size = _width(model), self._bottleneck_size(model)
        scaling = self.scaling or (PARALLEL_SCALING if self.placement == "parallel" else 1.0)
        for site in sites:
            adapter = BottleneckAdapter(width, size, self.nonlinearity, scaling, self.dropout)
            device = next(model.get_submodule(site.block).parameters()).device
            reads = model.get_submodule(site.given) if site.given else None
            add_adapter(model.get_submodule(site.adapted), adapter.to(device), reads, site.is_norm)

    def _blocks(self, model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
        """The blocks that get adapters."""
        blocks = block_modules(model, layout)
        if not blocks:
            raise MethodError(f"{architecture(model)} has no blocks where its layout says: {', '.join(layout.blocks)}")
        chosen = set(range(len(blocks)) if self.layers is None else self.layers)
        unknown = sorted(chosen.difference(range(len(blocks))))
        if unknown:
            raise MethodError(
                f"layers: {architecture(model)} has no block {unknown[0]}; its blocks are 0 to {len(blocks) - 1}"
            )
        return {name: block for index, (name, block) in enumerate(blocks.items()) if index in chosen}

    def _sites(self, model: nn.Module, layout: Layout) -> Iterator[Site]:
        """One for each adapter, in model order."""
        for block in self._blocks(model, layout):
            yield from self._sites_in(model, layout, block)

    def _sites_in(self, model: nn.Module, layout: Layout, block: str) -> Iterator[Site]:
        first = partial(self._first, model, block)
        results = layout.feed_forward_result or layout.roles.get("down", ())
        if self.placement == "pfeiffer":
            ends = layout.feed_forward_norm or layout.feed_forward_sum
            yield Site(block, first(ends, "end of the feed-forward network"), is_norm=bool(layout.feed_forward_norm))
        elif self.placement == "parallel":
            ups = [*layout.roles.get("up", ()), *(path for path, held in layout.fused.items() if "up" in held.roles)]
            yield Site(block, first(results, "feed-forward result"), given=first(ups, "up projection"))
        else:
            attention = layout.attention_result or layout.roles.get("output", ())
            # the first is self-attention: cross attention gets no adapter, which keeps two in every block
            yield Site(block, first(attention, "attention result"))
            yield Site(block, first(results, "feed-forward result"))

    def _first(self, model: nn.Module, block: str, paths: Sequence[str], what: str) -> str:
        """The full name of the first of `paths` that a block has."""
        inside = {name for name, _ in model.get_submodule(block).named_modules()}
        found = next((path for path in paths if path in inside), None)
        if found is None:
            raise MethodError(
                f"placement '{self.placement}': '{block}' has no {what} that the layout of {architecture(model)} "
                "names; complete the layout, or choose another placement"
            )
        return f"{block}.{found}".removesuffix(".")

    def _trained_norms(self, model: nn.Module, layout: Layout) -> list[nn.Module]:
        if not self.train_layernorm:
            return []
        config: Any = model.config
        inside = tuple(f"{name}." for name in self._blocks(model, layout))
        # a decoder taken out of an encoder-decoder keeps its cross attention and skips it
        unused = () if config.is_encoder_decoder else ("encoder_attn_layer_norm",)
        found = norms(model).items()
        return [norm for name, norm in found if name.startswith(inside) and not name.endswith(unused)]


def _width(model: Any) -> int:
    width: int = model.config.hidden_size
    return width
