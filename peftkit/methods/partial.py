"""Methods that train a named part of the model itself and add nothing to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods.base import train_in_float32, train_only
from peftkit.methods.in_model import InModel

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone


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
        return model

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        return 0
