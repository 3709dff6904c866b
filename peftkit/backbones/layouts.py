"""Where each architecture keeps its projections, and which of them a target names.

A target is a set (`query_value`, `attention`, `all`), a role (`query`, ..., `down`) or the name of a
module; several are joined with "+". Sets and roles look only inside the repeated blocks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pprint import pformat
from typing import TYPE_CHECKING, Any

from peftkit.errors import BackboneError, MethodError
from peftkit.schema import nearest

if TYPE_CHECKING:
    from torch.nn import Module

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
ATTENTION_ROLES = ROLES[:4]
TARGET_SETS = ("query_value", "attention", "all")


@dataclass(frozen=True)
class Layout:
    """One architecture: its repeated blocks and the role of every projection inside them.

    A path that only some blocks have (cross attention, the gate of a gated T5) matches where it is.
    """

    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# One architecture per row, wrapped by hand to be read as a table.
# fmt: off
LAYOUTS = (
    Layout(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("encoder.layer.*",),
        {"query": ("attention.self.query",), "key": ("attention.self.key",),
         "value": ("attention.self.value",), "output": ("attention.output.dense",),
         "up": ("intermediate.dense",), "down": ("output.dense",)}),
    Layout(
        ("distilbert",), ("transformer.layer.*",),
        {"query": ("attention.q_lin",), "key": ("attention.k_lin",), "value": ("attention.v_lin",),
         "output": ("attention.out_lin",), "up": ("ffn.lin1",), "down": ("ffn.lin2",)}),
    Layout(
        ("albert",), ("encoder.albert_layer_groups.*.albert_layers.*",),
        {"query": ("attention.query",), "key": ("attention.key",), "value": ("attention.value",),
         "output": ("attention.dense",), "up": ("ffn",), "down": ("ffn_output",)}),
    Layout(
        ("deberta",), ("encoder.layer.*",),
        {"output": ("attention.output.dense",), "up": ("intermediate.dense",), "down": ("output.dense",)},
        fused={"attention.self.in_proj": ("query", "key", "value")}),
    Layout(
        ("deberta-v2",), ("encoder.layer.*",),
        {"query": ("attention.self.query_proj",), "key": ("attention.self.key_proj",),
         "value": ("attention.self.value_proj",), "output": ("attention.output.dense",),
         "up": ("intermediate.dense",), "down": ("output.dense",)}),
    Layout(
        ("modernbert",), ("layers.*",), {"output": ("attn.Wo",), "down": ("mlp.Wo",)},
        fused={"attn.Wqkv": ("query", "key", "value"), "mlp.Wi": ("gate", "up")}),
    Layout(
        ("mpnet",), ("encoder.layer.*",),
        {"query": ("attention.attn.q",), "key": ("attention.attn.k",), "value": ("attention.attn.v",),
         "output": ("attention.attn.o",), "up": ("intermediate.dense",), "down": ("output.dense",)}),
    Layout(
        ("gpt2",), ("h.*",), {"output": ("attn.c_proj",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
        fused={"attn.c_attn": ("query", "key", "value")}),
    Layout(
        ("gpt_neox",), ("layers.*",),
        {"output": ("attention.dense",), "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",)},
        fused={"attention.query_key_value": ("query", "key", "value")}),
    Layout(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2"), ("layers.*",),
        {"query": ("self_attn.q_proj",), "key": ("self_attn.k_proj",), "value": ("self_attn.v_proj",),
         "output": ("self_attn.o_proj",),
         "gate": ("mlp.gate_proj",), "up": ("mlp.up_proj",), "down": ("mlp.down_proj",)}),
    Layout(
        ("phi3",), ("layers.*",), {"output": ("self_attn.o_proj",), "down": ("mlp.down_proj",)},
        fused={"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")}),
    Layout(
        ("t5", "mt5"), ("encoder.block.*", "decoder.block.*"),
        {"query": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
         "key": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
         "value": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
         "output": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
         "gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
         "up": ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1",
                "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
         "down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo")}),
    Layout(
        ("bart", "mbart", "marian", "pegasus"), ("encoder.layers.*", "decoder.layers.*"),
        {"query": ("self_attn.q_proj", "encoder_attn.q_proj"),
         "key": ("self_attn.k_proj", "encoder_attn.k_proj"),
         "value": ("self_attn.v_proj", "encoder_attn.v_proj"),
         "output": ("self_attn.out_proj", "encoder_attn.out_proj"), "up": ("fc1",), "down": ("fc2",)}),
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
        f"no layout for model type '{model_type}'{_alike(model_type, _BY_TYPE, _BY_TYPE)}\n"
        f"For a new architecture add this row to LAYOUTS in peftkit/backbones/layouts.py ({note}):\n\n{code}"
    )


def propose_layout(model_type: str, model: Module) -> Layout:
    """A row for `model`, the roles guessed from the names that known architectures use."""
    guesses = {path: _guess_roles(path) for path in _paths_in_blocks(model)}
    paths = {role: tuple(path for path, held in guesses.items() if held == (role,)) for role in ROLES}
    fused = {path: held for path, held in guesses.items() if len(held) > 1}
    blocks = tuple(dict.fromkeys(block for block, _ in _repeated_linears(model)))
    return Layout((model_type,), blocks, {role: found for role, found in paths.items() if found}, fused)


def base_model(model: Module) -> Module:
    """The pretrained part of a task model; a bare model is its own."""
    return getattr(model, "base_model", model)


def head_modules(model: Module) -> tuple[str, ...]:
    """The freshly initialised children of a task model.

    None in a language model: what stands beside its output (`vocab_transform`, `lm_head`) was pretrained.
    T5 keeps its stacks and embeddings beside the head, so the backbone is told by type and not by name.
    """
    from torch import nn
    from transformers import PreTrainedModel

    task_model: Any = model
    bare = not any(isinstance(child, PreTrainedModel) for child in model.children())
    if bare or task_model.get_output_embeddings() is not None:
        return ()
    pretrained = (PreTrainedModel, nn.Embedding)
    rest = ((name, child) for name, child in model.named_children() if not isinstance(child, pretrained))
    return tuple(name for name, child in rest if next(child.parameters(), None) is not None)


def block_linears(model: Module, layout: Layout) -> dict[str, Module]:
    """Every linear projection of the blocks, by its full name in `model`."""
    inside = _inside_block(layout)
    return {name: module for name, module in _linears(model) if inside.search(name)}


def target_modules(model: Module, layout: Layout, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules that `targets` names, in model order; every entry must match."""
    entries = targets.split("+") if isinstance(targets, str) else targets
    if not entries:
        raise MethodError(f"no targets; name at least one of {', '.join((*TARGET_SETS, *ROLES))} or a module")
    chosen = {name for entry in entries for name in _matches(model, layout, entry.strip())}
    return [name for name, _ in model.named_modules() if name in chosen]


def _matches(model: Module, layout: Layout, entry: str) -> set[str]:
    if entry == "query_value":
        return _with_role(model, layout, entry, "query") | _with_role(model, layout, entry, "value")
    if entry in ROLES:
        return _with_role(model, layout, entry, entry)
    roles = _roles_of_linears(model, layout)
    if entry == "attention":
        found = {name for name, held in roles.items() if not set(held).isdisjoint(ATTENTION_ROLES)}
    else:
        found = set(roles) if entry == "all" else _named(_adaptable(model), entry)
    if not found:
        raise MethodError(_no_match(model, layout, entry))
    return found


def _with_role(model: Module, layout: Layout, entry: str, role: str) -> set[str]:
    roles = _roles_of_linears(model, layout)
    found = {name for name, held in roles.items() if held == (role,)}
    if found:
        return found
    present = _roles_present(roles)
    if role in present:
        raise MethodError(_fused_role(model, layout, entry, role))
    known = ", ".join(present) or "none"
    raise MethodError(f"target '{entry}': {_architecture(model)} has no {role} projection; it has {known}")


def _fused_role(model: Module, layout: Layout, entry: str, role: str) -> str:
    path, held = next((path, held) for path, held in layout.fused.items() if role in held)
    others = " and ".join(other for other in held if other != role)
    wider = "`attention`, `all`" if role in ATTENTION_ROLES else "`all`"
    return (
        f"target '{entry}': in {_architecture(model)} {role} is fused in `{path}` with {others}; "
        f"{wider} or the explicit name `{path}` adapts the whole projection"
    )


def _no_match(model: Module, layout: Layout, entry: str) -> str:
    names = _adaptable(model)
    message = f"target '{entry}' matches no module of {_architecture(model)}"
    held = {f".{name}".partition(f".{entry}.")[2] for name in names} - {""}
    if held:
        listed = ", ".join(f"'{entry}.{path}'" for path in sorted(held)[:4])
        return f"{message} that can be adapted; '{entry}' holds others: name {listed} or more of them"
    choice = [*TARGET_SETS, *_roles_present(_roles_of_linears(model, layout))]
    return message + _alike(entry, [*choice, *_tails(names)], [*choice, "or a module's name"])


def _roles_present(roles: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [role for role in ROLES if any(role in held for held in roles.values())]


def _roles_of_linears(model: Module, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Full name of every block linear, with its role; several when fused, none when it has no role."""
    known = _roles_by_path([layout])
    inside = _inside_block(layout)
    matches = ((name, inside.search(name)) for name in block_linears(model, layout))
    return {name: known.get(match["path"], ()) for name, match in matches if match}


def _roles_by_path(layouts: Iterable[Layout]) -> dict[str, tuple[str, ...]]:
    roles = {path: (role,) for row in layouts for role, paths in row.roles.items() for path in paths}
    return roles | {path: held for row in layouts for path, held in row.fused.items()}


def _inside_block(layout: Layout) -> re.Pattern[str]:
    blocks = "|".join(re.escape(block).replace(r"\*", r"\d+") for block in layout.blocks)
    return re.compile(rf"(?:^|\.)(?:{blocks})\.(?P<path>.+)$")


def _linears(model: Module) -> Iterator[tuple[str, Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return ((name, part) for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)))


def _adaptable(model: Module) -> list[str]:
    """Names of all modules of the kinds that peft adapts, embeddings and head included."""
    from torch import nn

    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    linears = dict(_linears(model))
    return [name for name, part in model.named_modules() if name in linears or isinstance(part, others)]


def _named(names: Iterable[str], entry: str) -> set[str]:
    return {name for name in names if name == entry or name.endswith(f".{entry}")}


def _tails(names: Iterable[str]) -> list[str]:
    """The number-free ways to name the modules: `attention.self.query`, `self.query`, `query`."""
    paths = dict.fromkeys(re.split(r"(?:^|\.)\d+\.", name)[-1] for name in names)
    return [path.split(".", start)[-1] for path in paths for start in range(path.count(".") + 1)]


def _alike(name: str, candidates: Iterable[str], listed: Iterable[str]) -> str:
    """The candidates most like `name`, or what is `listed` when none is alike."""
    alike = difflib.get_close_matches(name, dict.fromkeys(candidates), n=3)
    if alike:
        return f"; did you mean {' or '.join(repr(match) for match in alike)}?"
    return f"; it can be: {', '.join(listed)}"


def _architecture(model: Any) -> str:
    return f"{model.config.model_type} ({type(model).__name__})"


def _repeated_linears(model: Module) -> list[tuple[str, str]]:
    """(block, path inside it) of every linear of the base model that stands below a number."""
    numbered = re.compile(r"(?P<block>(?:[^.]+\.)*?)\d+\.(?P<path>.+)")
    matches = (numbered.fullmatch(name) for name, _ in _linears(base_model(model)))
    return [(f"{match['block']}*", match["path"]) for match in matches if match]


def _paths_in_blocks(model: Module) -> list[str]:
    return list(dict.fromkeys(path for _, path in _repeated_linears(model)))


def _guess_roles(path: str) -> tuple[str, ...]:
    """The roles that known architectures give to the longest matching end of `path`, if they agree."""
    known = _roles_by_path(LAYOUTS)
    for tail in _tails([path]):
        found = {known[match] for match in _named(known, tail)}
        if found:
            return found.pop() if len(found) == 1 else ()
    return ()
