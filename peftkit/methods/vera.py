"""VeRA (Kopiczko et al. 2024), through peft."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from peftkit.errors import ArtifactError, MethodError
from peftkit.methods.from_peft import ADAPTER, FromPeft, are_transposed, refuse_embeddings, task_type

if TYPE_CHECKING:
    from peft import VeraConfig
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.targets import Target

HASH = "projections_sha256"
TORCH = "torch_version"


class VeRA(FromPeft):
    """W x + b ⊙ B (d ⊙ A x), where the vectors d (rank) and b (out) train for each target (equation 2 of the paper).

    A (rank × in) and B (out × rank) are random, the same for all targets, and drawn again from `projection_seed` on
    loading instead of being saved; smaller targets use their first columns and rows. b starts at zero, so the model
    starts as the untouched one. The defaults are the paper's for RoBERTa-large; a rank may exceed the matrices'.
    """

    size: ClassVar[str | None] = "rank"
    kind: Literal["vera"] = "vera"
    rank: Annotated[int, Field(gt=0)] = 256
    d_initial: float = 0.1
    """Every element of d before training."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    projection_seed: Annotated[int, Field(ge=0)] = 0
    targets: str | tuple[str, ...] = "all"
    """`query_value`, `attention`, `all`, or roles and module names, joined by `+` or as a list."""

    @field_validator("d_initial")
    @classmethod
    def _not_zero(cls, value: float) -> float:
        if not value:
            raise ValueError("d_initial must not be 0: b starts at 0 too, and neither would ever get a gradient")
        return value

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> VeraConfig:
        from peft import VeraConfig

        names = [target.name for target in targets]
        return VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            save_projection=False,
            target_modules=names,
            fan_in_fan_out=are_transposed(backbone.model, names),
            modules_to_save=list(backbone.head_modules) or None,
            task_type=task_type(backbone.model),
        )

    def notes(self, model: nn.Module) -> dict[str, str]:
        import torch

        return {HASH: _projections_sha256(model).hexdigest(), TORCH: str(torch.__version__)}

    def check_notes(self, model: nn.Module, notes: dict[str, str], folder: Path) -> None:
        import torch

        if notes.get(HASH) != _projections_sha256(model).hexdigest():
            raise ArtifactError(
                f"the random projections of {folder} come out otherwise here, with torch {torch.__version__}, than "
                f"where it was trained, with torch {notes.get(TORCH, 'unknown')}; load it with that version and "
                "with the backbone.dtype of training"
            )

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {HASH: _hash_tensor(model)}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        import torch

        if not torch.equal(state[HASH].cpu(), _hash_tensor(model)):
            raise MethodError(
                f"method 'vera' draws other random projections here, with torch {torch.__version__}, than in the "
                "checkpoint; resume with the version that started the run, or start again with output.overwrite=true"
            )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Σ (rank + out) over the adapted matrices; A and B are neither trained nor saved."""
        targets = self.targets_in(model, layout)
        refuse_embeddings(model, targets, "VeRA")
        return sum(self.rank + target.outputs for target in targets)


def _projections_sha256(model: nn.Module) -> Any:
    """Of the values of A and B, in float32."""
    peft_model: Any = model
    found = hashlib.sha256()
    for shared in (peft_model.base_model.vera_A, peft_model.base_model.vera_B):
        found.update(shared[ADAPTER].detach().cpu().float().contiguous().numpy().tobytes())
    return found


def _hash_tensor(model: nn.Module) -> Tensor:
    """The same as 32 bytes that a checkpoint can hold."""
    import torch

    return torch.tensor(list(_projections_sha256(model).digest()), dtype=torch.uint8)
