"""Full fine-tuning: every parameter trains. The reference every other method is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.backbones.quantization import Quantization, refuse_quantized
from peftkit.disk import follow_umask
from peftkit.errors import ArtifactError, MethodError
from peftkit.methods.base import Method, inside, lost_to_rounding, module_parameters, numel, refuse_nan
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.tasks.base import Task


class Full(Method):
    """All parameters of backbone and head. What is saved is a whole transformers model."""

    artifact: ClassVar[str] = "model"
    kind: Literal["full"] = "full"

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        from peftkit.backbones.new_tokens import fold_backbone

        fold_backbone(backbone)
        for parameter in backbone.model.parameters():
            if conflict := lost_to_rounding(self.kind, str(parameter.dtype).removeprefix("torch.")):
                raise MethodError(conflict)
        return backbone.model.requires_grad_(True)

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        if quantization is not None:
            return refuse_quantized(f"method '{self.kind}' trains all weights of the backbone", quantization)
        return [conflict] if (conflict := lost_to_rounding(self.kind, dtype)) else []

    def save(self, model: nn.Module, folder: Path) -> None:
        with quiet_libraries():
            model.save_pretrained(folder)  # type: ignore[operator]
        follow_umask(folder)

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        from peftkit.backbones.new_tokens import fold_backbone

        fold_backbone(backbone)
        # by transformers, which writes some architectures' weights under other names than the model has
        base: Any = backbone.model
        how = {"config": base.config, "dtype": base.dtype, "use_safetensors": True, "local_files_only": True}
        with quiet_libraries():
            model, info = type(base).from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **how
            )
        for name, saved, own in sorted(info["mismatched_keys"])[:1]:
            raise ArtifactError(f"{folder}: '{name}' has shape {tuple(saved)}, where this model's has {tuple(own)}")
        if unexpected := info["unexpected_keys"]:
            raise ArtifactError(f"{folder} has weights this model lacks: {', '.join(sorted(unexpected)[:3])}")
        if missing := info["missing_keys"]:
            raise ArtifactError(f"{folder} lacks weights: {', '.join(sorted(missing)[:3])}")
        refuse_nan(dict(model.named_parameters()), folder)
        backbone.model = model
        loaded: nn.Module = model.requires_grad_(False)
        return loaded

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        plain: Any = model
        how = {"config": plain.config, "dtype": plain.dtype, "use_safetensors": True, "local_files_only": True}
        with quiet_libraries():
            loaded, info = type(plain).from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **how
            )
        differing = {name for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
        differing |= {name for name in info["unexpected_keys"] if not inside(name, dropped)}
        if lacking := sorted(name for name in differing if not inside(name, kept)):
            raise MethodError(f"its weights are not those of this model: they differ in {', '.join(lacking[:3])}")
        saved = dict(loaded.named_parameters())
        for name, parameter in model.named_parameters():
            if not inside(name, kept):
                parameter.data.copy_(saved[name])

    def merge(self, model: nn.Module) -> nn.Module:
        return model

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        return 0

    def tuned_parameters(self, model: nn.Module, heads: tuple[str, ...]) -> int:
        return sum(map(numel, model.parameters())) - module_parameters(model, heads)
