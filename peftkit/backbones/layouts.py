"""Where each architecture keeps its projections, attention and sublayers: one row of a table for each.

Adding an architecture is adding a row; `layout_for` shows the row to write for one that is not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pprint import pformat
from typing import TYPE_CHECKING

from peftkit.backbones.modules import base_model, linears, named, number_free_tails
from peftkit.errors import BackboneError
from peftkit.schema import alike, nearest

if TYPE_CHECKING:
    from torch.nn import Module

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
ATTENTION_ROLES = ROLES[:4]


@dataclass(frozen=True)
class Fused:
    """Several projections in one matrix, in the order of its outputs."""

    roles: tuple[str, ...]
    by_head: bool = False
    """The outputs of the roles alternate head by head rather than follow each other whole."""


@dataclass(frozen=True)
class Layout:
    """One architecture: its repeated blocks, and what is where inside them. Paths are relative to a block.

    A path that only some blocks have (cross attention, the gate of a gated T5) matches where it is.
    """

    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    fused: Mapping[str, Fused] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    """The modules that attend: those that know the heads and call the attention function."""
    attention_result: tuple[str, ...] = ()
    """What gives the attention's result before it is added to its input, with its dropout where one module gives both;
    self-attention comes before cross attention. Empty: `output`."""
    feed_forward_result: tuple[str, ...] = ()
    """The same for the feed-forward network; empty: `down`."""
    feed_forward_norm: tuple[str, ...] = ()
    """The normalisation of input + result, where it comes after the feed-forward network."""
    feed_forward_sum: tuple[str, ...] = ("",)
    """Where it comes before: the module that returns input + result; "" is the block itself."""


# One architecture per row, wrapped by hand to be read as a table.
# fmt: off
_LLAMA = {
    "query": ("self_attn.q_proj",), "key": ("self_attn.k_proj",), "value": ("self_attn.v_proj",),
    "output": ("self_attn.o_proj",),
    "gate": ("mlp.gate_proj",), "up": ("mlp.up_proj",), "down": ("mlp.down_proj",),
}
_BART = {
    "query": ("self_attn.q_proj", "encoder_attn.q_proj"),
    "key": ("self_attn.k_proj", "encoder_attn.k_proj"),
    "value": ("self_attn.v_proj", "encoder_attn.v_proj"),
    "output": ("self_attn.out_proj", "encoder_attn.out_proj"), "up": ("fc1",), "down": ("fc2",),
}
LAYOUTS = (
    Layout(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("encoder.layer.*",),
        {"query": ("attention.self.query",), "key": ("attention.self.key",),
         "value": ("attention.self.value",), "output": ("attention.output.dense",),
         "up": ("intermediate.dense",), "down": ("output.dense",)},
        attention=("attention.self",),
        attention_result=("attention.output.dropout",), feed_forward_result=("output.dropout",),
        feed_forward_norm=("output.LayerNorm",)),
    Layout(
        ("distilbert",), ("transformer.layer.*",),
        {"query": ("attention.q_lin",), "key": ("attention.k_lin",), "value": ("attention.v_lin",),
         "output": ("attention.out_lin",), "up": ("ffn.lin1",), "down": ("ffn.lin2",)},
        attention=("attention",), feed_forward_result=("ffn.dropout",), feed_forward_norm=("output_layer_norm",)),
    Layout(
        ("albert",), ("encoder.albert_layer_groups.*.albert_layers.*",),
        {"query": ("attention.query",), "key": ("attention.key",), "value": ("attention.value",),
         "output": ("attention.dense",), "up": ("ffn",), "down": ("ffn_output",)},
        attention=("attention",), attention_result=("attention.output_dropout",),
        feed_forward_norm=("full_layer_layer_norm",)),
    Layout(
        ("deberta",), ("encoder.layer.*",),
        {"output": ("attention.output.dense",), "up": ("intermediate.dense",), "down": ("output.dense",)},
        fused={"attention.self.in_proj": Fused(("query", "key", "value"), by_head=True)},
        attention=("attention.self",),
        attention_result=("attention.output.dropout",), feed_forward_result=("output.dropout",),
        feed_forward_norm=("output.LayerNorm",)),
    Layout(
        ("deberta-v2",), ("encoder.layer.*",),
        {"query": ("attention.self.query_proj",), "key": ("attention.self.key_proj",),
         "value": ("attention.self.value_proj",), "output": ("attention.output.dense",),
         "up": ("intermediate.dense",), "down": ("output.dense",)},
        attention=("attention.self",),
        attention_result=("attention.output.dropout",), feed_forward_result=("output.dropout",),
        feed_forward_norm=("output.LayerNorm",)),
    Layout(
        ("modernbert",), ("layers.*",), {"output": ("attn.Wo",), "down": ("mlp.Wo",)},
        fused={"attn.Wqkv": Fused(("query", "key", "value")), "mlp.Wi": Fused(("gate", "up"))},
        attention=("attn",), attention_result=("attn.out_drop",)),
    Layout(
        ("mpnet",), ("encoder.layer.*",),
        {"query": ("attention.attn.q",), "key": ("attention.attn.k",), "value": ("attention.attn.v",),
         "output": ("attention.attn.o",), "up": ("intermediate.dense",), "down": ("output.dense",)},
        attention=("attention.attn",),
        attention_result=("attention.dropout",), feed_forward_result=("output.dropout",),
        feed_forward_norm=("output.LayerNorm",)),
    Layout(
        ("gpt2",), ("h.*",), {"output": ("attn.c_proj",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
        fused={"attn.c_attn": Fused(("query", "key", "value"))},
        attention=("attn",), attention_result=("attn.resid_dropout",), feed_forward_result=("mlp.dropout",)),
    Layout(
        ("gpt_neox",), ("layers.*",),
        {"output": ("attention.dense",), "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",)},
        fused={"attention.query_key_value": Fused(("query", "key", "value"), by_head=True)},
        attention=("attention",),
        attention_result=("post_attention_dropout",), feed_forward_result=("post_mlp_dropout",)),
    Layout(
        ("llama", "mistral", "qwen2", "qwen3", "gemma"), ("layers.*",),
        _LLAMA,
        attention=("self_attn",)),
    Layout(
        ("gemma2", "gemma3_text", "olmo2"), ("layers.*",),
        _LLAMA,
        attention=("self_attn",),
        # each sublayer's result is normalised before it is added
        attention_result=("post_attention_layernorm",), feed_forward_result=("post_feedforward_layernorm",)),
    Layout(
        ("phi3",), ("layers.*",), {"output": ("self_attn.o_proj",), "down": ("mlp.down_proj",)},
        fused={"self_attn.qkv_proj": Fused(("query", "key", "value")), "mlp.gate_up_proj": Fused(("gate", "up"))},
        attention=("self_attn",),
        attention_result=("resid_attn_dropout",), feed_forward_result=("resid_mlp_dropout",)),
    Layout(
        ("t5", "mt5"), ("encoder.block.*", "decoder.block.*"),
        {"query": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
         "key": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
         "value": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
         "output": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
         "gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
         "up": ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1",
                "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
         "down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo")},
        attention=("layer.0.SelfAttention", "layer.1.EncDecAttention"),
        attention_result=("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
        feed_forward_result=("layer.1.DenseReluDense", "layer.2.DenseReluDense")),
    Layout(
        ("bart", "marian"), ("encoder.layers.*", "decoder.layers.*"),
        _BART,
        attention=("self_attn", "encoder_attn"), feed_forward_norm=("final_layer_norm",)),
    Layout(
        ("mbart", "pegasus"), ("encoder.layers.*", "decoder.layers.*"),
        _BART,
        attention=("self_attn", "encoder_attn")),
)
# fmt: on
_BY_TYPE = {model_type: row for row in LAYOUTS for model_type in row.model_types}


def layout_for(model_type: str, model: Module | None = None) -> Layout:
    """The row of `model_type`; for an unknown type the error shows the row to write, read off `model`."""
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    if model is None:
        example = nearest(model_type, _BY_TYPE) or "bert"
        row = replace(_BY_TYPE[example], model_types=(model_type,))
        note = f"its paths are those of {example}: replace them"
    else:
        row = propose_layout(model_type, model)
        note = f"check the roles; the linears in its blocks are {', '.join(_paths_in_blocks(model))}"
    code = pformat(row, width=100, sort_dicts=False)
    raise BackboneError(
        f"no layout for model type '{model_type}'{alike(model_type, _BY_TYPE, _BY_TYPE)}\n"
        f"For a new architecture add this row to LAYOUTS in peftkit/backbones/layouts.py ({note}):\n\n{code}"
    )


def propose_layout(model_type: str, model: Module) -> Layout:
    """A row for `model`, the roles guessed from the names that known architectures use."""
    guesses = {path: _guess_roles(path) for path in _paths_in_blocks(model)}
    paths = {role: tuple(path for path, held in guesses.items() if held == (role,)) for role in ROLES}
    fused = {path: Fused(held) for path, held in guesses.items() if len(held) > 1}
    blocks = tuple(dict.fromkeys(block for block, _ in _repeated_linears(model)))
    roles = {role: found for role, found in paths.items() if found}
    attending = dict.fromkeys(
        path.rpartition(".")[0]
        for path, held in guesses.items()
        if not {"query", "key", "value"}.isdisjoint(held) and "." in path
    )
    return Layout((model_type,), blocks, roles, fused, attention=tuple(attending))


def roles_by_path(layouts: Iterable[Layout]) -> dict[str, tuple[str, ...]]:
    """The roles of every path of the rows; several where they are fused."""
    roles = {path: (role,) for row in layouts for role, paths in row.roles.items() for path in paths}
    return roles | {path: fused.roles for row in layouts for path, fused in row.fused.items()}


def in_blocks(layout: Layout) -> re.Pattern[str]:
    """Matches the full name of what is inside a block; groups `block` and `path`."""
    blocks = "|".join(re.escape(block).replace(r"\*", r"\d+") for block in layout.blocks)
    return re.compile(rf"(?:^|\.)(?P<block>{blocks})\.(?P<path>.+)$")


def block_modules(model: Module, layout: Layout) -> dict[str, Module]:
    """The repeated blocks by full name, in model order; a shared one (ALBERT's) once."""
    blocks = "|".join(re.escape(block).replace(r"\*", r"\d+") for block in layout.blocks)
    whole = re.compile(rf"(?:^|.*\.)(?:{blocks})$")
    return {name: part for name, part in model.named_modules() if whole.fullmatch(name)}


def _repeated_linears(model: Module) -> list[tuple[str, str]]:
    """(block, path inside it) of every linear of the base model that stands below a number."""
    numbered = re.compile(r"(?P<block>(?:[^.]+\.)*?)\d+\.(?P<path>.+)")
    matches = (numbered.fullmatch(name) for name, _ in linears(base_model(model)))
    return [(f"{match['block']}*", match["path"]) for match in matches if match]


def _paths_in_blocks(model: Module) -> list[str]:
    return list(dict.fromkeys(path for _, path in _repeated_linears(model)))


def _guess_roles(path: str) -> tuple[str, ...]:
    """The roles that known architectures give to the longest matching end of `path`, if they agree."""
    known = roles_by_path(LAYOUTS)
    for tail in number_free_tails([path]):
        found = {known[match] for match in named(known, tail)}
        if found:
            return found.pop() if len(found) == 1 else ()
    return ()
