"""Methods that train a named part of the model itself and add nothing to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.disk import follow_umask
from peftkit.errors import ArtifactError, MethodError
from peftkit.methods.base import Method, train_in_float32, train_only, trained_parameters, trained_tensors

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone

WEIGHTS = "trained.safetensors"


class HeadOnly(Method):
    """The task's head over a frozen backbone (linear probing where the head is one linear layer).

    Saved as safetensors of the trained parameters under their names in the model.
    """

    artifact: ClassVar[str] = "head"
    kind: Literal["head"] = "head"

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        if not backbone.head_modules:
            raise MethodError("method 'head' needs a model with a task head; this one has none to train")
        train_only(backbone.model, backbone.head_modules)
        train_in_float32(backbone.model, backbone.head_modules)
        return backbone.model

    def save(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(trained_tensors(model), folder / WEIGHTS, metadata={"format": "pt", "method": self.kind})
        follow_umask(folder)

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        from safetensors.torch import load_file

        self.attach(backbone, total_steps=1)
        expected = trained_parameters(backbone.model)
        tensors = load_file(folder / WEIGHTS)
        if expected.keys() != tensors.keys():
            differing = sorted(expected.keys() ^ tensors.keys())
            raise ArtifactError(f"{folder / WEIGHTS} is not of this model: it differs in {', '.join(differing[:3])}")
        for name, parameter in expected.items():
            if parameter.shape != tensors[name].shape:
                raise ArtifactError(f"{folder / WEIGHTS}: '{name}' has shape {tuple(tensors[name].shape)}")
            parameter.data.copy_(tensors[name])
        return backbone.model.requires_grad_(False)

    def merge(self, model: nn.Module) -> nn.Module:
        return model

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        return 0
