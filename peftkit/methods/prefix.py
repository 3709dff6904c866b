"""Prefix tuning (Li & Liang 2021), in every block as in P-tuning v2 (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.backbones.modules import architecture
from peftkit.errors import MethodError, NotMergeable
from peftkit.methods.base import (
    check_trained,
    module_parameters,
    train_in_float32,
    train_only,
    trained_tensors,
)
from peftkit.methods.in_model import InModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.backbones.attention import AttentionModule
    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.methods.prefix_layers import PrefixLayer

CHILD = "prefix"
"""The module inside each attention module."""


class Prefix(InModel):
    """softmax(Q [P_K; K]ᵀ / √d) [P_V; V] in every attention module, where P_K and P_V (length × width) train.

    Encoder, decoder and cross attention have prefixes of their own; a block that is repeated has one. No position
    bias and no window reaches the prefix. The positions of real tokens begin at `length` in models that count what is
    in their cache, as if the prefix were in it; in encoders that take no cache they stay what they were.
    """

    artifact: ClassVar[str] = "adapter"
    size: ClassVar[str | None] = "length"
    free: ClassVar[frozenset[str]] = InModel.free | {
        *("initialization", "initialization_text", "reparametrization_size"),
    }
    kind: Literal["prefix"] = "prefix"
    length: Annotated[int, Field(gt=0)] = 20
    """Keys and values that are prepended in each attention module."""
    reparametrization_size: Annotated[int, Field(gt=0)] | None = None
    """Hidden units of the MLP that makes them while training (Li & Liang, section 4.3); it is not saved."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the prepended keys and values."""
    initialization: Literal["random", "text"] = "random"
    """`text`: what the untouched model computes for `initialization_text`, repeated or cut to `length` tokens."""
    initialization_text: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fitting_start(self) -> Prefix:
        if (self.initialization == "text") != (self.initialization_text is not None):
            raise ValueError("initialization 'text' and initialization_text need each other; set both or neither")
        if self.initialization == "text" and self.reparametrization_size:
            raise ValueError(
                "initialization 'text' sets keys and values themselves, but with reparametrization_size an MLP "
                "computes them; leave one of the two out"
            )
        return self

    def virtual_tokens(self) -> int:
        return self.length

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        from peftkit.backbones.attention import attention_modules, open_seam
        from peftkit.methods.prefix_layers import shift_positions

        model, heads = backbone.model, backbone.head_modules
        if any(True for _ in prefix_layers(model)):
            raise MethodError("this model has a prefix already; attach to a model as transformers loads it")
        expected = self.added_parameters(model, backbone.layout) + module_parameters(model, heads)
        modules = attention_modules(model, backbone.layout)
        for module, layer in zip(modules, self._layers(backbone, modules), strict=True):
            attention = model.get_submodule(module.name)
            open_seam(attention)
            attention.add_module(CHILD, layer.to(next(attention.parameters()).device))
        shift_positions(model, self.length)
        train_only(model, [*heads, *(f"{module.name}.{CHILD}" for module in modules)])
        train_in_float32(model, heads)
        check_trained(model, expected, self)
        return model

    def attach_for_inference(self, backbone: Backbone) -> nn.Module:
        direct = {"reparametrization_size": None, "initialization": "random", "initialization_text": None}
        return self.model_copy(update=direct).attach(backbone, total_steps=1)

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        if self.reparametrization_size:
            raise MethodError(
                "the MLP of reparametrization_size is not saved, only the keys and values that it made; leave "
                "method.reparametrization_size out to train those on"
            )
        super().restore(model, folder, dropped, kept)

    def saved_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The head, and the keys and values that the prefix amounts to."""
        tensors = {name: tensor for name, tensor in trained_tensors(model).items() if f".{CHILD}." not in name}
        for name, layer in prefix_layers(model):
            keys, values = (rows.detach().contiguous().cpu() for rows in layer.rows())
            tensors |= {f"{name}.key": keys, f"{name}.value": values}
        return tensors

    def merge(self, model: nn.Module) -> nn.Module:
        raise NotMergeable(
            "method 'prefix' adds keys and values inside attention, which no weights of the plain model stand for; "
            "ship the run folder itself, with the backbone beside it: `peftkit bundle RUN OUT` makes one folder of both"
        )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Σ length · (key width + value width) over the attention modules; with an MLP of size h, for each kind of
        attention: length · width + (width + 1) · h, and Σ (h + 1) · (key width + value width)."""
        size = self.reparametrization_size
        if size is None:
            return self.stored_parameters(model, layout)
        modules = self._modules(model, layout)
        widths = {module.kind: module.key_width for module in modules}
        shared = sum(self.length * width + (width + 1) * size for width in widths.values())
        return shared + sum((size + 1) * (module.key_width + module.value_width) for module in modules)

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        return sum(self.length * (module.key_width + module.value_width) for module in self._modules(model, layout))

    def _modules(self, model: nn.Module, layout: Layout) -> list[AttentionModule]:
        """The attention modules, if the model can have a prefix of this length."""
        from peftkit.backbones.attention import attention_modules
        from peftkit.methods.prefix_layers import counted_positions

        modules = attention_modules(model, layout)
        config: Any = model.config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and self.length >= limit and any(True for _ in counted_positions(model)):
            raise MethodError(
                f"length {self.length} leaves no position for any token: {architecture(model)} has {limit}; "
                "lower method.length"
            )
        return modules

    def _layers(self, backbone: Backbone, modules: list[AttentionModule]) -> list[PrefixLayer]:
        from peftkit.methods.prefix_layers import DirectPrefix, ReparametrizedPrefix, SharedStart

        size = self.reparametrization_size
        if size is None:
            return [DirectPrefix(keys, values, self.dropout) for keys, values in self._start(backbone, modules)]
        widths = {module.kind: module.key_width for module in modules}
        shared = {kind: SharedStart(self.length, width, size) for kind, width in widths.items()}
        return [ReparametrizedPrefix(shared[module.kind], module, self.dropout) for module in modules]

    def _start(self, backbone: Backbone, modules: list[AttentionModule]) -> list[tuple[Tensor, Tensor]]:
        """The keys and values that training starts from, module by module."""
        from peftkit.methods.prefix_layers import drawn, recorded

        if self.initialization_text is None:
            return drawn(modules, self.length)
        if backbone.tokenizer is None:
            raise MethodError("initialization 'text' needs the backbone's tokenizer; load the backbone by its name")
        ids = backbone.tokenizer(self.initialization_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise MethodError(f"the tokenizer makes no token of initialization_text {self.initialization_text!r}")
        repeats = -(-self.length // len(ids))
        return recorded(backbone.model, modules, (ids * repeats)[: self.length])


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixLayer]]:
    """Every prefix in the model, by its full name."""
    from peftkit.methods.prefix_layers import PrefixLayer

    return ((name, part) for name, part in model.named_modules() if isinstance(part, PrefixLayer))
