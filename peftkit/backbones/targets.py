"""Which projections a target names.

A target is a set (`query_value`, `attention`, `all`), a role (`query`, ..., `down`) or the name of a
module; several are joined with "+". Sets and roles look only inside the repeated blocks. A role that is fused
with others in one matrix is the part of it: `attn.c_attn.query`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.backbones.layouts import ATTENTION_ROLES, ROLES, Fused, Layout, in_blocks, roles_by_path
from peftkit.backbones.modules import adaptable, architecture, linears, named, number_free_tails
from peftkit.errors import MethodError
from peftkit.schema import alike

if TYPE_CHECKING:
    from torch.nn import Module

TARGET_SETS = ("query_value", "attention", "all")


@dataclass(frozen=True)
class Target:
    """A projection to adapt: a module, or the part of a fused one that computes one role."""

    name: str
    inputs: int
    outputs: int
    fused_in: str | None = None
    """The module that it is a part of."""


def find_targets(model: Module, layout: Layout, targets: str | Sequence[str]) -> list[Target]:
    """What `targets` names, in model order; every entry must match.

    Raises:
        MethodError: an entry that matches nothing, with near names; or a projection named whole and in part.
    """
    entries = targets.split("+") if isinstance(targets, str) else targets
    if not entries:
        raise MethodError(f"no targets; name at least one of {', '.join((*TARGET_SETS, *ROLES))} or a module")
    parts = fused_parts(model, layout)
    chosen = {name for entry in entries for name in _matches(model, layout, entry.strip(), parts)}
    both = sorted(name for name in chosen if name in parts and parts[name][0] in chosen)
    if both:
        raise MethodError(f"targets: '{both[0]}' is a part of '{parts[both[0]][0]}', which is named too; keep one")
    found = []
    for name, module in model.named_modules():
        if name in chosen:
            found.append(Target(name, *_shape(name, module)))
        widths = {part: width for part, (whole, _, width) in parts.items() if whole == name and part in chosen}
        found += [Target(part, _shape(name, module)[0], width, name) for part, width in widths.items()]
    return found


def target_modules(model: Module, layout: Layout, targets: str | Sequence[str]) -> list[str]:
    """The names of `find_targets`."""
    return [target.name for target in find_targets(model, layout, targets)]


def block_linears(model: Module, layout: Layout) -> dict[str, Module]:
    """Every linear projection of the blocks, by its full name in `model`."""
    inside = in_blocks(layout)
    return {name: module for name, module in linears(model) if inside.search(name)}


def fused_parts(model: Module, layout: Layout) -> dict[str, tuple[str, str, int]]:
    """The parts of fused projections by full name: (the fused module, role, outputs)."""
    inside, parts = in_blocks(layout), {}
    for name, module in linears(model):
        match = inside.search(name)
        fused = layout.fused.get(match["path"]) if match else None
        if fused:
            widths = part_widths(fused, _shape(name, module)[1], model)
            parts.update({f"{name}.{role}": (name, role, width) for role, width in widths.items()})
    return parts


def part_widths(fused: Fused, outputs: int, model: Any) -> dict[str, int]:
    """Outputs of each role of a fused projection; keys and values can have fewer heads than queries."""
    if "query" not in fused.roles:
        return dict.fromkeys(fused.roles, outputs // len(fused.roles))
    heads = model.config.num_attention_heads
    of_keys = getattr(model.config, "num_key_value_heads", None) or heads
    width = outputs // (heads + 2 * of_keys)
    return {role: width * (heads if role == "query" else of_keys) for role in fused.roles}


def _matches(model: Module, layout: Layout, entry: str, parts: Mapping[str, tuple[str, str, int]]) -> set[str]:
    if entry == "query_value":
        both = (_with_role(model, layout, entry, role, parts) for role in ("query", "value"))
        return set().union(*both)
    if entry in ROLES:
        return _with_role(model, layout, entry, entry, parts)
    roles = _roles_of_linears(model, layout)
    if entry == "attention":
        found = {name for name, held in roles.items() if not set(held).isdisjoint(ATTENTION_ROLES)}
    else:
        found = set(roles) if entry == "all" else named([*adaptable(model), *parts], entry)
    if not found:
        raise MethodError(_no_match(model, layout, entry, parts))
    return found


def _with_role(
    model: Module, layout: Layout, entry: str, role: str, parts: Mapping[str, tuple[str, str, int]]
) -> set[str]:
    roles = _roles_of_linears(model, layout)
    found = {name for name, held in roles.items() if held == (role,)}
    found |= {name for name, (_, held, _) in parts.items() if held == role}
    if not found:
        known = ", ".join(_roles_present(roles)) or "none"
        raise MethodError(f"target '{entry}': {architecture(model)} has no {role} projection; it has {known}")
    return found


def _no_match(model: Module, layout: Layout, entry: str, parts: Mapping[str, tuple[str, str, int]]) -> str:
    names = [*adaptable(model), *parts]
    message = f"target '{entry}' matches no module of {architecture(model)}"
    held = {f".{name}".partition(f".{entry}.")[2] for name in names} - {""}
    if held:
        listed = ", ".join(f"'{entry}.{path}'" for path in sorted(held)[:4])
        return f"{message} that can be adapted; '{entry}' holds others: name {listed} or more of them"
    choice = [*TARGET_SETS, *_roles_present(_roles_of_linears(model, layout))]
    return message + alike(entry, [*choice, *number_free_tails(names)], [*choice, "or a module's name"])


def _roles_present(roles: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [role for role in ROLES if any(role in held for held in roles.values())]


def _roles_of_linears(model: Module, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Full name of every block linear, with its role; several when fused, none when it has no role."""
    known = roles_by_path([layout])
    inside = in_blocks(layout)
    matches = ((name, inside.search(name)) for name in block_linears(model, layout))
    return {name: known.get(match["path"], ()) for name, match in matches if match}


def _shape(name: str, module: Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or an embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise MethodError(f"'{name}' is a {type(module).__name__}; only linear layers and embeddings can be adapted")
