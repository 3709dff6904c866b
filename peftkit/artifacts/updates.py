"""What a run adds to its backbone: the change of every parameter in float64, as factors where it has low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import SavedRun, found_again, in_full_precision
from peftkit.artifacts.low_rank import Change, LowRank, added
from peftkit.backbones.load import Backbone, Head, load
from peftkit.backbones.quantize import dequantize
from peftkit.config import Run
from peftkit.errors import ArtifactError, UsageError
from peftkit.methods.base import inside
from peftkit.methods.peft_files import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn


PLAIN_LAYERS = ("Linear", "Embedding", "Linear4bit", "Linear8bitLt")
"""Names of peft's classes whose update is scale · B A; the last two stand on bitsandbytes' layers."""


@dataclass(frozen=True)
class Origin:
    """The run that an update is of, without its weights."""

    folder: Path
    run: Run
    manifest: dict[str, Any]
    head: Head

    @property
    def trained_heads(self) -> tuple[str, ...]:
        """The modules that replace those of the backbone."""
        return tuple(self.manifest["trained_heads"])

    def load_backbone(self) -> Backbone:
        """The untouched backbone, with a head that is new."""
        return load(found_again(self.run.backbone, self.manifest), self.head)


@dataclass(frozen=True)
class Update:
    """What a run adds, by the names that parameters have in the plain model."""

    origin: Origin
    changes: dict[str, Change]
    """Of the backbone; parameters that did not change are left out."""
    heads: dict[str, Tensor]
    """The values of the task's head, which replace those of the backbone."""


def update_of(saved: SavedRun) -> Update:
    """What a run adds to its backbone; LoRA and AdaLoRA as factors, all that merges else as differences of weights.

    Consumes `saved.model`.

    Raises:
        NotMergeable: the method changes no weights.
        ArtifactError: what it changes are not numbers.
    """
    origin = Origin(saved.folder, saved.run, saved.manifest, saved.head)
    layers = _lora_layers(saved.model)
    update = _of_lora(saved, origin, layers) if layers else _of_merged(saved, origin)
    for name, change in [*update.changes.items(), *update.heads.items()]:
        for part in (change.a, change.b) if isinstance(change, LowRank) else (change,):
            if not part.isfinite().all():
                raise ArtifactError(f"{saved.folder}: what it makes of '{name}' is not a number; train it again")
    return update


def plain_backbone(origin: Origin) -> Backbone:
    """The untouched backbone in float32, with the values that training saw where it was quantised."""
    backbone = origin.load_backbone()
    if origin.run.backbone.quantization is not None:
        dequantize(backbone.model)
    backbone.model.float()
    return backbone


def is_held_transposed(module: nn.Module) -> bool:
    """Whether the weight is (inputs, outputs), in the words of LoRA."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (Conv1D, nn.Embedding))


def parameters_of(model: nn.Module, heads: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters of the backbone, those of the heads), by name; tied ones once."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return (
        {name: one for name, one in found.items() if not inside(name, heads)},
        {name: one for name, one in found.items() if inside(name, heads)},
    )


def differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """`after` less `before` in float64, by name, where anything differs.

    Raises:
        UsageError: other parameters or shapes.
    """
    shapes = [{name: tuple(one.shape) for name, one in side.items()} for side in (before, after)]
    for name in sorted(before.keys() | after.keys()):
        ours, theirs = (side.get(name) for side in shapes)
        if ours != theirs:
            raise UsageError(
                f"{what}: '{name}' is {theirs or 'missing'}, where the backbone has {ours or 'nothing'}; only changes "
                "of the backbone's own weights can be told"
            )
    changes = {name: after[name].double() - one.double() for name, one in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


def _of_merged(saved: SavedRun, origin: Origin) -> Update:
    """By merging in float64, which every method does by itself."""
    if "new_tokens" in origin.trained_heads or saved.head.new_tokens:
        raise UsageError(
            f"{saved.folder}: its task added tokens to the vocabulary, and the change of an embedding that the "
            "backbone does not have cannot be told"
        )
    before, _ = parameters_of(plain_backbone(origin).model, origin.trained_heads)
    merged = saved.run.method.merge(in_full_precision(saved).double())
    after, heads = parameters_of(merged, origin.trained_heads)
    changes = differences(before, after, str(saved.folder))
    return Update(origin, dict(changes), {name: value.float() for name, value in heads.items()})


def _of_lora(saved: SavedRun, origin: Origin, layers: dict[str, Any]) -> Update:
    model: Any = saved.model
    changes: dict[str, Change] = {}
    for name, layer in layers.items():
        for parameter, change in _of_layer(layer):
            module, widened = _in_fused(model.get_base_model(), name, change)
            key = f"{module}.{parameter}"
            changes[key] = added([changes[key], widened]) if key in changes else widened
    if model.peft_config[ADAPTER].bias != "none":
        changes |= _trained_biases(origin, layers)
    return Update(origin, changes, _trained_heads(model, origin.trained_heads))


def _lora_layers(model: Any) -> dict[str, Any]:
    """peft's layers by the names of the modules that they stand for; none where the update is no product alone."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if str(getattr(getattr(config, "peft_type", None), "value", "")) != "LORA":
        return {}
    from peft.tuners.lora.layer import LoraLayer

    found = {name: part for name, part in model.get_base_model().named_modules() if isinstance(part, LoraLayer)}
    plain = all(type(part).__name__ in PLAIN_LAYERS and not part.lora_variant for part in found.values())
    return found if plain else {}


def _of_layer(layer: Any) -> Iterator[tuple[str, Change]]:
    """What one layer adds to its weight, and to its bias."""
    scale = layer.scaling[ADAPTER]
    transposed = is_held_transposed(layer.get_base_layer())
    if ADAPTER in layer.lora_embedding_A:
        a, b, bias = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER], None
    else:
        a, b, bias = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.lora_B[ADAPTER].bias
    yield "weight", LowRank(b.detach().double() * scale, a.detach().double(), transposed)
    if bias is not None:
        yield "bias", bias.detach().double() * scale


def _in_fused(model: nn.Module, name: str, change: Change) -> tuple[str, Change]:
    """The change of a part of a fused projection as one of the whole: rows of zeros for the other parts."""
    from peftkit.backbones.fused import SplitProjection

    outside, _, role = name.rpartition(".")
    owner = model.get_submodule(outside)
    if not isinstance(owner, SplitProjection):
        return name, change
    rows, outputs = owner.rows_of(role), owner.outputs
    if not isinstance(change, LowRank):
        return outside, change.new_zeros(outputs).index_copy(0, rows, change)
    b = change.b.new_zeros(outputs, change.rank).index_copy(0, rows, change.b)
    return outside, LowRank(b, change.a, owner.transposed)


def _trained_biases(origin: Origin, layers: dict[str, Any]) -> dict[str, Change]:
    """Biases of adapted layers that trained in their places, as peft's `bias: lora_only` lets them."""
    before, _ = parameters_of(plain_backbone(origin).model, origin.trained_heads)
    found = {name: getattr(layer.get_base_layer(), "bias", None) for name, layer in layers.items()}
    trained = {f"{name}.bias": one.detach().double() for name, one in found.items() if one is not None}
    if lost := sorted(trained.keys() - before.keys()):
        raise UsageError(f"{origin.folder}: '{lost[0]}' is a part of a fused bias, which cannot be told from the whole")
    changes = {name: value - before[name].double() for name, value in trained.items()}
    return {name: change for name, change in changes.items() if change.any()}


def _trained_heads(model: Any, heads: tuple[str, ...]) -> dict[str, Tensor]:
    from peft.utils import ModulesToSaveWrapper

    found: dict[str, Tensor] = {}
    for name, part in model.get_base_model().named_modules():
        if isinstance(part, ModulesToSaveWrapper) and name in heads:
            trained: Any = part.modules_to_save[ADAPTER]
            found |= {f"{name}.{inner}": one.detach() for inner, one in trained.named_parameters()}
    return found
