"""The tensors of a merged model, made one by one from a checkpoint and a run, by the same arithmetic as in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.hollow import Hollow
from peftkit.backbones.load import BackboneSettings
from peftkit.errors import ArtifactError, NotMergeable
from peftkit.methods.peft_files import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn


class Layers:
    """Merged tensors by their names in the plain model."""

    def __init__(self, source: Hollow, model: nn.Module, settings: BackboneSettings, precision: str) -> None:
        """`model` is what the run's method made of the hollow backbone.

        Raises:
            NotMergeable: layers that only a whole model merges.
        """
        import torch

        from peftkit.backbones.new_tokens import rows_by_name

        self.source, self.settings = source, settings
        self.model: Any = getattr(getattr(model, "base_model", None), "model", model) if _is_peft(model) else model
        self.wanted: dtype = getattr(torch, precision)
        self.held: dtype = getattr(torch, settings.dtype)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._new = {name.replace(".base_layer", ""): one for name, one in rows_by_name(self.model).items()}
        _refuse_unknown(self.model)

    def adapted(self) -> dict[str, Any]:
        """peft's layers around those of the backbone, by the name of the plain layer."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {
            name: part
            for name, part in self.model.named_modules()
            if isinstance(part, BaseTunerLayer) and ".base_layer" not in name and hasattr(part, "base_layer")
        }

    def tensor(self, name: str) -> Tensor:
        """W + ΔW, in full precision.

        Raises:
            ArtifactError: it is not a number.
        """
        module_name, _, attribute = name.rpartition(".")
        layer = self._find(module_name)
        if hasattr(layer, "base_layer"):
            if self._last[0] != module_name:
                self._last = (module_name, self._merged(module_name, layer))
            value = self._last[1][attribute]
        else:
            value = self._plain(name, getattr(layer, attribute))
        return _checked(name, value)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The same in pieces, of which those that the backbone only passes on are small. Raises as `tensor` does."""
        module_name = name.rpartition(".")[0]
        own = name in self.source.brought or name in self._new or module_name in self.source.packed
        if own or name not in self.source.sources or hasattr(self._find(module_name), "base_layer"):
            yield self.tensor(name)
            return
        for piece in self.source.checkpoint.parts(self.source.sources[name]):
            yield _checked(name, piece.to(self.held).to(self.wanted) if piece.is_floating_point() else piece)

    @contextmanager
    def filled(self, name: str, layer: Any) -> Iterator[nn.Module]:
        """peft's layer with the weights of the checkpoint in it, in full precision, for as long as it is needed."""
        from torch import nn

        base = layer.get_base_layer()
        before = dict(base.named_parameters(recurse=False))
        for attribute in before:
            values = self._plain(f"{name}.{attribute}", before[attribute])
            setattr(base, attribute, nn.Parameter(values.to(self.wanted), requires_grad=False))
        layer.to(self.wanted).eval()
        try:
            yield layer
        finally:
            for attribute, parameter in before.items():
                setattr(base, attribute, parameter)

    def _merged(self, name: str, layer: Any) -> dict[str, Tensor]:
        with self.filled(name, layer):
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            base = layer.get_base_layer()
            found = {attribute: one.detach() for attribute, one in base.named_parameters(recurse=False)}
            layer.merged_adapters.clear()  # the layer is hollow again: there is nothing to take ΔW out of
        return found

    def _plain(self, name: str, own: Tensor) -> Tensor:
        """A tensor of the backbone with the values that training saw; one of the run where it brought it along."""
        held = self.source.sources.get(name)
        if name in self.source.brought:
            return own.detach().to(self.wanted) if own.is_floating_point() else own.detach()
        if held is None:
            raise ArtifactError(f"--streaming: the checkpoint lacks '{name}'; merge without it")
        values = self.source.checkpoint.read(held)
        if not values.is_floating_point():
            return values
        values = values.to(self.held)
        module = name.rpartition(".")[0]
        if module in self.source.packed and name.endswith(".weight"):
            values = self._as_trained(module, values)
        if name in self._new:
            values = self._with_rows(name, values, own)
        return values.to(self.wanted)

    def _as_trained(self, name: str, values: Tensor) -> Tensor:
        """What packing leaves of a weight."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from peftkit.backbones.quantized_layers import pack, packing_device, unpack

        found = self._find(name)
        plain: Any = found.get_base_layer() if hasattr(found, "base_layer") else found
        one: Any = Conv1D(1, 1) if isinstance(plain, Conv1D) else nn.Linear(1, 1, bias=False)
        one.weight, one.bias = nn.Parameter(values, requires_grad=False), None
        assert self.settings.quantization is not None
        unpacked: Any = unpack(pack(name, one, self.settings.quantization, packing_device(one)))
        weight: Tensor = unpacked.weight.detach().cpu()
        return weight

    def _with_rows(self, name: str, values: Tensor, own: Tensor) -> Tensor:
        """Word embeddings with the rows of new tokens."""
        import torch

        ids, rows = self._new[name]
        found = torch.zeros(own.shape, dtype=values.dtype)
        found[: len(values)] = values
        found = found.to(self.wanted)
        found[ids] = rows.to(self.wanted)
        return found

    def _find(self, name: str) -> Any:
        """The module of a name in the plain model, whatever was put in its place."""
        from peft.utils import ModulesToSaveWrapper

        found: Any = self.model
        for part in filter(None, name.split(".")):
            found = getattr(found, part)
            if isinstance(found, ModulesToSaveWrapper):
                found = found.modules_to_save[ADAPTER]
        return found


def _checked(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() and not values.isfinite().all():
        raise ArtifactError(f"'{name}' holds NaN or infinity after the merge; restore the run, or train again")
    return values


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _refuse_unknown(model: nn.Module) -> None:
    from peftkit.backbones.fused import SplitProjection
    from peftkit.methods.from_peft import tied_and_adapted

    if tied_and_adapted(model):
        raise NotMergeable(
            "--streaming: the word embeddings share a matrix with the output, and one of them alone is adapted, which "
            "makes two matrices of it in memory alone; merge without it"
        )

    if any(isinstance(part, SplitProjection) for part in model.modules()):
        raise NotMergeable(
            "--streaming: a part of a fused projection was adapted, which is split and put together again in memory "
            "alone; merge without it"
        )
