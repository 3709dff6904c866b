"""A model without its weights, on which methods are loaded as on a whole one.

Each parameter has its shape and type, and the memory of one number: peft finds in it what it looks for, and only what a
method brings along takes room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.checkpoints import Checkpoint
from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import (
    CONFIG,
    Backbone,
    BackboneSettings,
    Head,
    chosen_config,
    load_tokenizer,
    meta_model,
    resolve,
    tell_padding,
    weight_files,
)
from peftkit.backbones.modules import base_model
from peftkit.backbones.quantize import packable
from peftkit.backbones.task_model import trained_heads
from peftkit.errors import BackboneError
from peftkit.methods.base import inside

if TYPE_CHECKING:
    from torch import dtype, nn

GENERATION = "generation_config.json"


@dataclass
class Hollow:
    """A backbone whose weights stay on the disk."""

    backbone: Backbone
    checkpoint: Checkpoint
    files: list[Path]
    sources: dict[str, str]
    """The name in the checkpoint of each tensor that comes from it, by the name in the model."""
    saved: dict[str, str]
    """The name of each tensor in the plain model, by the name that it is saved under, in the order of saving; of shared
    ones there is one."""
    shapes: dict[str, tuple[dtype, tuple[int, ...]]]
    """Types and shapes, by the same names."""
    buffers: set[str]
    """Of these, what is saved and counts as no parameter."""
    brought: set[str]
    """Of these, those that the run has and not the checkpoint: its head, and what a method trained in the model."""
    packed: set[str]
    """Linear layers that training held in few bits."""


def hollow(settings: BackboneSettings, head: Head, real: Iterable[str] = ()) -> Hollow:
    """The backbone as `load` gives it, but for its weights.

    Args:
        real: parameters that a method writes into, which get memory of their own.

    Raises:
        BackboneError: a checkpoint whose weights have other names than the model's, or lacks some.
    """
    from peftkit.backbones.new_tokens import add_to_model

    folder = resolve(settings)
    config = chosen_config(settings, folder)
    layout, files = layout_for(config.model_type), weight_files(folder)
    tokenizer = load_tokenizer(settings, head.pretokenized)
    model: Any = meta_model(config, head, settings.dtype)
    model.eval()
    checkpoint = Checkpoint(files)
    sources = _sources(model, checkpoint)
    saved = _saved_names(model)
    names = list(saved.values())
    fresh = {name for name in names if name not in sources}
    heads = trained_heads(model, fresh, folder)
    brought = {*real, *(name for name in names if inside(name, heads))}
    _empty(model, brought)
    packed = set(packable(model, layout)) if settings.quantization else set()
    if head.new_tokens:
        add_to_model(model, tokenizer, head.new_tokens)
        heads = trained_heads(model, fresh, folder)
    tell_padding(model, tokenizer)
    if head.chat_template:
        tokenizer.chat_template = head.chat_template
    if model.can_generate():
        from transformers import GenerationConfig

        # as transformers finds it where it loads weights
        own = (folder / GENERATION).is_file()
        where: dict[str, Any] = {} if own else {"config_file_name": CONFIG, "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True, **where)
    backbone = Backbone(model, tokenizer, layout, heads, settings.name)
    state = model.state_dict()
    shapes = {name: (state[own].dtype, tuple(state[own].shape)) for name, own in saved.items()}
    parameters = dict(model.named_parameters())
    buffers = {name for name, own in saved.items() if own not in parameters}
    return Hollow(backbone, checkpoint, files, sources, saved, shapes, buffers, brought, packed)


def _sources(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    prefix = f"{model.base_model_prefix}." if base_model(model) is not model else ""
    found = {}
    for name in model.state_dict():
        for held in (name, name.removeprefix(prefix), f"{model.base_model_prefix}.{name}"):
            if held in checkpoint:
                found[name] = held
                break
    if not found:
        raise BackboneError(
            "--streaming: the checkpoint's weights have other names than the model's, which only transformers' own "
            "loading knows how to translate; merge without it"
        )
    return found


def _saved_names(model: Any) -> dict[str, str]:
    """What transformers would save, and from which tensors: of tied ones the main one, none that it leaves out, and all
    under the names that checkpoints of this architecture have."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(state, model)
    own = {id(tensor): name for name, tensor in kept.items()}
    model._weight_conversions = []  # as loading leaves it where it translated nothing
    renamed = revert_weight_conversion(model, dict(kept))
    if any(id(tensor) not in own for tensor in renamed.values()):
        raise BackboneError(
            "--streaming: checkpoints of this architecture hold weights in another form than the model does, which "
            "transformers puts together in memory; merge without it"
        )
    return {name: own[id(tensor)] for name, tensor in renamed.items()}


def _empty(model: nn.Module, real: set[str]) -> None:
    """Give every parameter on the meta device its shape in memory, of one number unless it is among `real`."""
    import torch
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                full = f"{module_name}.{name}".removeprefix(".")
                values = torch.zeros(parameter.shape if full in real else (), dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(values.expand(parameter.shape), requires_grad=False)
            setattr(module, name, made[id(parameter)])
