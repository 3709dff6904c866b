"""What the contract is checked with: every method, and the variants of it that take another path through the code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.methods import AnyMethod
from peftkit.methods.base import Method

_ADAPTER = TypeAdapter(AnyMethod)


def linears_in_blocks(model: nn.Module) -> int:
    """Linear layers below a number, told without a layout."""
    named = ((f".{name}", part) for name, part in model.named_modules())
    return sum(isinstance(part, nn.Linear | Conv1D) and bool(re.search(r"\.\d+\.", name)) for name, part in named)


def attentions(model: Any) -> int:
    """Attention modules; the decoder's blocks have two."""
    layout = layout_for(model.config.model_type)
    blocks = block_modules(model, layout).values()
    inside = [name for block in blocks for name, _ in block.named_modules()]
    return sum(name in layout.attention for name in inside)


def blocks(model: Any) -> int:
    """Repeated blocks, of encoder and decoder together; a shared one once."""
    return len(block_modules(model, layout_for(model.config.model_type)))


@dataclass(frozen=True, eq=False)
class Variant:
    """A method's configuration, and what is true of it on every architecture."""

    name: str
    settings: dict[str, Any]
    trained: str
    """What the name of every trained parameter outside the head contains, as a regular expression."""
    places: Callable[[nn.Module], int] | None = None
    """How many modules are adapted, of the untouched model; what stands before `trained` tells them apart."""
    start: Literal["same", "rounded", "changed"] = "same"
    """The function before the first step: the untouched one bit for bit, up to rounding, or another."""
    steps: int = 2
    may_stay: str = "^$"
    """Trained parameters that training may leave as they were, as a regular expression."""
    rewrites_base: bool = False
    """The base is changed at the start, so that what is saved computes the same up to rounding only."""

    @property
    def kind(self) -> str:
        """The method's name in the registry."""
        return str(self.settings["kind"])

    @property
    def method(self) -> Method:
        """The configured method, read as from a configuration file."""
        method: Method = _ADAPTER.validate_json(json.dumps(self.settings), strict=True)
        return method


def _two_of_each_attention(model: nn.Module) -> int:
    return 2 * attentions(model)


def _one_of_each_block(model: nn.Module) -> int:
    return blocks(model)


def _two_of_each_block(model: nn.Module) -> int:
    return 2 * blocks(model)


def _keys_values_and_downs(model: nn.Module) -> int:
    return 2 * attentions(model) + blocks(model)


def _one(model: nn.Module) -> int:
    return 1


def _lora(name: str, places: Any = linears_in_blocks, start: Any = "same", **changes: Any) -> Variant:
    settings = {"kind": "lora", "rank": 4, "alpha": 8.0} | changes
    rewrites = str(changes.get("initialization")).startswith(("pissa", "olora"))
    return Variant(name, settings, r"\.lora_(A|B|magnitude_vector)\.", places, start, rewrites_base=rewrites)


def _bottleneck(name: str, places: Any, trained: str = r"\.adapter\.", **changes: Any) -> Variant:
    return Variant(name, {"kind": "bottleneck", "bottleneck_size": 4} | changes, trained, places)


def _peft(name: str, trained: str, places: Any = linears_in_blocks, **fields: Any) -> Variant:
    return Variant(f"peft {name}", {"kind": "peft", "type": name} | fields, trained, places, "rounded")


_ADALORA = {"target_rank": 2, "initial_rank": 4, "warmup_fraction": 0.2, "final_fraction": 0.2, "allocate_every": 1}
_PREFIX = {"kind": "prefix", "length": 4}
VARIANTS = (
    _lora("lora"),
    _lora("lora query_value", _two_of_each_attention, "rounded", targets="query_value"),
    _lora("lora key+output", _two_of_each_attention, "rounded", targets="key+output"),
    _lora("lora rslora", variant="rslora"),
    _lora("lora dora", start="rounded", variant="dora"),
    _lora("lora+", b_learning_rate_factor=4.0),
    _lora("lora gaussian", initialization="gaussian"),
    _lora("lora orthogonal", start="rounded", initialization="orthogonal"),
    _lora("lora pissa", start="rounded", initialization="pissa"),
    _lora("lora olora dora", start="rounded", initialization="olora", variant="dora"),
    _lora("lora mica", initialization="mica"),
    # a matrix that loses its whole rank ends with the zeros that it started with
    Variant(
        "adalora", {"kind": "adalora"} | _ADALORA, r"\.lora_(A|B|E)", linears_in_blocks, steps=5, may_stay=r"\.lora_E"
    ),
    _bottleneck("bottleneck houlsby", _two_of_each_block, placement="houlsby", nonlinearity="gelu"),
    _bottleneck("bottleneck pfeiffer", _one_of_each_block, placement="pfeiffer", nonlinearity="swish"),
    _bottleneck("bottleneck parallel", _one_of_each_block, placement="parallel", nonlinearity="tanh"),
    _bottleneck("bottleneck, norms too", None, r"\.adapter\.|(?i:norm)|ln_", nonlinearity="gelu", train_layernorm=True),
    _bottleneck("bottleneck, one layer", _one, layers=[0], reduction_factor=8.0, bottleneck_size=None),
    Variant("prefix", _PREFIX, r"\.prefix\.(key|value)$", attentions, "changed"),
    Variant("prefix through an MLP", _PREFIX | {"reparametrization_size": 8}, r"\.prefix\.", None, "changed"),
    Variant("prompt", {"kind": "prompt", "length": 4}, r"prompt_encoder\.", _one, "changed"),
    Variant("p_tuning", {"kind": "p_tuning", "length": 4}, r"prompt_encoder\.", _one, "changed"),
    Variant("ia3", {"kind": "ia3"}, r"\.ia3_l\.", _keys_values_and_downs, "rounded"),
    Variant("vera", {"kind": "vera", "rank": 8}, r"\.vera_lambda_[bd]\.", linears_in_blocks),
    _peft("loha", r"\.hada_", r=4, alpha=4),
    _peft("lokr", r"\.lokr_", r=4, alpha=4),
    _peft("oft", r"\.oft_R\.", oft_block_size=8),
    _peft("fourierft", r"\.fourierft_spectrum\.", n_frequency=20, scaling=10.0, init_weights=True),
    _peft("ln_tuning", r"\.ln_tuning_layers\.", None),
    Variant("bitfit", {"kind": "bitfit"}, r"[._]bias$"),
    Variant("layernorm", {"kind": "layernorm"}, r"(?i:norm)|ln_"),
    Variant("top_layers", {"kind": "top_layers", "layers": 1}, r"\.\d+\.|(?i:norm)|ln_|pooler"),
    Variant("head", {"kind": "head"}, "^$"),
    Variant("full", {"kind": "full"}, ""),
)
