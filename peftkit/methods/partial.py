"""Methods that train a named part of the model itself and add nothing to it."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.modules import architecture, base_model, norms
from peftkit.backbones.quantization import Quantization, refuse_quantized
from peftkit.errors import MethodError
from peftkit.methods.base import check_trained, lost_to_rounding, module_parameters, numel, train_in_float32, train_only
from peftkit.methods.in_model import InModel

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.tasks.base import Task

FINAL_NORMS = ("ln_f", "final_layer_norm", "final_norm", "layer_norm", "norm")
"""What architectures call the normalisation that stands beside a stack of blocks and comes after its last one."""


class HeadOnly(InModel):
    """The task's head over a frozen backbone (linear probing where the head is one linear layer)."""

    artifact: ClassVar[str] = "head"
    kind: Literal["head"] = "head"

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        if not backbone.head_modules:
            raise MethodError("method 'head' needs a model with a task head; this one has none to train")
        train_only(backbone.model, backbone.head_modules)
        train_in_float32(backbone.model, backbone.head_modules)
        return backbone.model

    def merge(self, model: nn.Module) -> nn.Module:
        from peftkit.backbones.new_tokens import fold

        return fold(model)

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        return 0


class Partial(InModel):
    """Parameters of the backbone that train where they are, and the head with them.

    Of the backbone alone: what a language model has after it stays as it was pretrained. What the model does not use
    gets no gradient and is left out, as the pooler of a backbone without a head.
    """

    artifact: ClassVar[str] = "trained"

    @abstractmethod
    def chosen(self, names: Iterable[str], model: nn.Module, layout: Layout) -> set[str]:
        """Those of `names`, the backbone's parameters, that train.

        Raises:
            MethodError: the architecture has none, or not as many as asked for.
        """

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        model, heads = backbone.model, backbone.head_modules
        tuned = self._tuned(model, backbone.layout, heads)
        for name, parameter in tuned.items():
            self._refuse_packed(name, parameter)
            if conflict := lost_to_rounding(self.kind, str(parameter.dtype).removeprefix("torch.")):
                raise MethodError(conflict)
        train_only(model, heads)
        for parameter in tuned.values():
            parameter.requires_grad_(True)
        train_in_float32(model, heads)
        check_trained(model, self.tuned_parameters(model, heads) + module_parameters(model, heads), self)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        from peftkit.backbones.new_tokens import fold

        return fold(model)

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        return [conflict] if (conflict := lost_to_rounding(self.kind, dtype)) else []

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """None; raises where the architecture has nothing of what the method trains."""
        self._tuned(model, layout, ())
        return 0

    def tuned_parameters(self, model: nn.Module, heads: tuple[str, ...]) -> int:
        config: Any = model.config
        return sum(map(numel, self._tuned(model, layout_for(config.model_type, model), heads).values()))

    def _tuned(self, model: nn.Module, layout: Layout, heads: tuple[str, ...]) -> dict[str, nn.Parameter]:
        backbone = _backbone_parameters(model, heads)
        chosen = self.chosen(backbone, model, layout)
        return {name: parameter for name, parameter in backbone.items() if name in chosen}

    def _refuse_packed(self, name: str, parameter: nn.Parameter) -> None:
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):  # bitsandbytes'
            raise MethodError(
                f"method '{self.kind}' cannot train '{name}', which is quantised; load the backbone without "
                "quantisation"
            )


class BitFit(Partial):
    """Every bias of the backbone (Ben Zaken et al. 2022), those of its normalisations included."""

    kind: Literal["bitfit"] = "bitfit"

    def chosen(self, names: Iterable[str], model: nn.Module, layout: Layout) -> set[str]:
        found = {name for name in names if re.search(r"[._]bias$", name)}  # DeBERTa has a q_bias and a v_bias
        if not found:
            raise MethodError(
                f"method 'bitfit': {architecture(model)} has no biases in its backbone; 'layernorm' trains as few "
                "parameters, and an adapter such as 'lora' fits every architecture"
            )
        return found


class LayerNorm(Partial):
    """Weights, and biases where there are any, of every normalisation of the backbone, RMSNorm included."""

    kind: Literal["layernorm"] = "layernorm"

    def chosen(self, names: Iterable[str], model: nn.Module, layout: Layout) -> set[str]:
        parts = norms(model)
        found = {name for name in names if name.rpartition(".")[0] in parts}
        if not found:
            raise MethodError(f"method 'layernorm': {architecture(model)} has no normalisation with parameters")
        return found


class TopLayers(Partial):
    """The last blocks of the backbone and what comes after them: a final normalisation, and a pooler that is used.

    In an encoder-decoder these are the last `layers` blocks of the encoder and as many of the decoder.
    """

    size: ClassVar[str | None] = "layers"
    kind: Literal["top_layers"] = "top_layers"
    layers: Annotated[int, Field(gt=0)] = 2

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        if quantization is not None:
            return refuse_quantized(f"method '{self.kind}' trains weights of the backbone", quantization)
        return super().conflicts(task=task, dtype=dtype, quantization=quantization, checkpointing=checkpointing)

    def chosen(self, names: Iterable[str], model: nn.Module, layout: Layout) -> set[str]:
        parts, tops = norms(model), [*_poolers(model)]
        for pattern, blocks in _stacks(model, layout).items():
            self._refuse_too_many(model, pattern, len(blocks))
            # a final normalisation is a child of the same module as the list of blocks
            beside = pattern.partition("*")[0].removesuffix(".").rpartition(".")[0]
            final = {f"{beside}.{name}".removeprefix(".") for name in FINAL_NORMS}
            tops += [*blocks[-self.layers :], *(name for name in parts if name in final)]
        inside = tuple(f"{name}." for name in tops)
        return {name for name in names if name.startswith(inside)}

    def _refuse_too_many(self, model: Any, pattern: str, blocks: int) -> None:
        if self.layers <= blocks:
            return
        what = f"{blocks} block{'s' if blocks > 1 else ''} in '{pattern}'"
        depth = getattr(model.config, "num_hidden_layers", blocks)
        if model.config.model_type == "albert" and depth > blocks:
            what += f", which its {depth} layers share"
        raise MethodError(
            f"method 'top_layers': layers is {self.layers}, but {architecture(model)} has {what}; lower method.layers"
        )


def _stacks(model: nn.Module, layout: Layout) -> dict[str, list[str]]:
    """The blocks, in model order, by what their names have in common: `encoder.block.*` and `decoder.block.*`."""
    stacks: dict[str, list[str]] = {}
    for name in block_modules(model, layout):
        stacks.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return stacks


def _backbone_parameters(model: nn.Module, heads: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of the pretrained part that the model computes with, by full name in the task model."""
    base = base_model(model)
    own = {id(parameter) for parameter in base.parameters()}
    outside = [*heads, *(_poolers(model) if base is model else ())]
    if not getattr(model.config, "is_encoder_decoder", True):
        # a decoder that was taken out of an encoder-decoder keeps its cross attention, and skips it
        outside += [
            name for name, _ in model.named_modules() if name.endswith((".encoder_attn", ".encoder_attn_layer_norm"))
        ]
    inside = tuple(f"{name}." for name in outside)
    return {name: p for name, p in model.named_parameters() if id(p) in own and not name.startswith(inside)}


def _poolers(model: nn.Module) -> list[str]:
    """The backbone's pooler, if it has one. It is used exactly where there is a head, or the head did without it."""
    base = base_model(model)
    return [name for name, part in model.named_modules() if part is getattr(base, "pooler", None)]
