"""Methods whose trained parameters live in the model under names of its own: saved as exactly these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.disk import follow_umask
from peftkit.errors import ArtifactError
from peftkit.methods.base import Method, check_fit, inside, refuse_nan, trained_parameters, trained_tensors
from peftkit.tensor_files import read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.backbones.load import Backbone

WEIGHTS = "trained.safetensors"


class InModel(Method):
    """What trains is saved as safetensors, by its names in the model, and put back into an attached one."""

    def save(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.saved_tensors(model), folder / WEIGHTS, metadata={"method": self.kind})
        follow_umask(folder)

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        model = self.attach_for_inference(backbone)
        expected, file = trained_parameters(model), folder / WEIGHTS
        tensors = read_tensors(file)
        refuse_nan(tensors, file)
        if expected.keys() != tensors.keys():
            differing = sorted(expected.keys() ^ tensors.keys())
            raise ArtifactError(f"{file} is not of this model: it differs in {', '.join(differing[:3])}")
        for name, parameter in expected.items():
            if parameter.shape != tensors[name].shape:
                raise ArtifactError(f"{file}: '{name}' has shape {tuple(tensors[name].shape)}")
            parameter.data.copy_(tensors[name])
        return model.requires_grad_(False)

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        expected = {name: p for name, p in trained_parameters(model).items() if not inside(name, kept)}
        saved = {name: one for name, one in read_tensors(folder / WEIGHTS).items() if not inside(name, dropped)}
        check_fit(expected, saved)
        for name, parameter in expected.items():
            parameter.data.copy_(saved[name])

    def saved_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What `save` writes."""
        return trained_tensors(model)

    def attach_for_inference(self, backbone: Backbone) -> nn.Module:
        """The model whose trained parameters are those that `save` wrote."""
        return self.attach(backbone, total_steps=1)
