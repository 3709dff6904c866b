"""The matrix products of a model's step, found by going through one example: sizes, and which gradients they need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftkit.backbones.layouts import in_blocks, layout_for, roles_by_path

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTED = re.compile(r"\.(base_layer|lora_[AB]\..+)$")
"""What peft adds to the name of a layer."""


@dataclass(frozen=True)
class Product:
    """One linear layer: `outputs` × `inputs` times rows of `inputs` numbers."""

    inputs: int
    outputs: int
    rows: Literal["token", "example", "supervised"]
    """What there is a row of."""
    trains: bool
    needs_input_gradient: bool
    role: str = ""
    """Of the layouts; the same for what is added to a layer; empty outside of the blocks."""
    is_base: bool = True
    """Not what an adapter adds."""
    is_last: bool = False
    """In the last block."""
    group: int = 0
    """The same for products of one input."""

    @property
    def size(self) -> int:
        """Multiplications and additions for one row."""
        return 2 * self.inputs * self.outputs


@dataclass(frozen=True)
class Shapes:
    """What the arithmetic of a model follows from."""

    products: tuple[Product, ...]
    layers: int
    attended: int
    """The width of all heads together."""
    is_causal: bool
    reads_one: bool
    """Of the last block, one position of each example is read, or else the supervised ones."""
    trained: int
    """Parameters that train."""
    width: int
    """Of what a token is embedded as."""


def shapes_of(model: nn.Module, example: dict[str, Any]) -> Shapes:
    """Go through `example` (token ids of more than one token, no labels), with gradients, without a backward pass.

    Only plain linear layers and peft's additions to them are seen, and attention; not GPT-2's transposed ones.
    """
    from torch import nn

    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, output = plain.config.get_text_config(), plain.get_output_embeddings()
    roles, inside = (
        roles_by_path([layout_for(config.model_type, plain)]),
        in_blocks(layout_for(config.model_type, plain)),
    )
    length = example["input_ids"].numel()
    found: list[tuple[str, nn.Linear, Tensor]] = []
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(lambda layer, given: found.append((names[layer], layer, given[0])))
        for layer in names
    ]
    try:
        model(**example)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, int] = {}
    blocks = [match["block"] for name, _, _ in found if (match := inside.search(name))]
    products = []
    for name, layer, given in found:
        match = inside.search(ADAPTED.sub("", name))
        per_token = given.numel() == length * layer.in_features
        products.append(
            Product(
                layer.in_features,
                layer.out_features,
                "supervised" if layer is output else "token" if per_token else "example",
                layer.weight.requires_grad,
                given.requires_grad,
                "+".join(roles.get(match["path"], ())) if match else "",
                ".lora_" not in name,
                bool(match) and match["block"] == blocks[-1],
                groups.setdefault(id(given), len(groups)),
            )
        )
    heads = config.num_attention_heads
    return Shapes(
        products=tuple(products),
        layers=config.num_hidden_layers,
        attended=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        is_causal=output is not None,
        reads_one=any(one.rows == "example" for one in products),
        trained=sum(one.numel() for one in model.parameters() if one.requires_grad),
        width=config.hidden_size,
    )
