"""AdaLoRA (Zhang et al. 2023): a rank budget that falls during training, shared out by importance; by peft."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.errors import MethodError
from peftkit.methods.from_peft import ADAPTER, LEFT_OUT, FromPeft, are_transposed, refuse_embeddings, task_type
from peftkit.methods.lora import refuse_large_rank

if TYPE_CHECKING:
    from peft import AdaLoraConfig
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.targets import Target
    from peftkit.methods.adalora_allocation import Allocation

Share = Annotated[float, Field(ge=0, lt=1)]
Smoothing = Annotated[float, Field(gt=0, lt=1)]
FEWEST_REALLOCATIONS = 2
USUAL_REALLOCATIONS = 200


class AdaLoRA(FromPeft):
    """W x + (alpha / initial_rank) · P Λ Q x, where P (out × rank), Λ (diagonal) and Q (rank × in) train.

    Every matrix starts with `initial_rank` singular triplets. After a warm-up, the total that is kept falls along a
    cubic curve to `target_rank` for each matrix on average, and the least important triplets of all matrices lose
    their singular value; what is left trains on in the final phase. What is saved is pruned to these triplets.

    The orthogonality of P and Q is asked for by `penalty`, and by nothing else: `outputs.loss` of the attached model
    is the task's loss alone. A training loop of one's own adds `penalty(model)` to the loss, and calls
    `after_step(model, step)` after each optimizer step, before it clears the gradients (clipped, if it clips them:
    importance is measured on the gradients that the step was made with), or `skipped_step` where a gradient scaler
    left the step out.
    """

    size: ClassVar[str | None] = "target_rank"
    kind: Literal["adalora"] = "adalora"
    target_rank: Annotated[int, Field(gt=0)] = 8
    """Final rank, averaged over the adapted matrices."""
    initial_rank: Annotated[int, Field(gt=0)] | None = None
    """Rank of each at first; by default 1.5 × `target_rank`, rounded up."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all"
    """`query_value`, `attention`, `all`, or roles and module names, joined by `+` or as a list."""
    warmup_fraction: Share = 0.12
    """Share of the optimizer steps before the budget begins to fall; the default is about the paper's for SST-2."""
    final_fraction: Share = 0.44
    """Share of the optimizer steps, and at least one, that come after the last reallocation; default as above."""
    allocate_every: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps between two reallocations; by default such that there are about two hundred."""
    sensitivity_smoothing: Smoothing = 0.85
    """β₁ of equation 9."""
    uncertainty_smoothing: Smoothing = 0.85
    """β₂ of equation 10."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """γ of equation 4, for the mean that `penalty` takes; the paper's runs use 0.1 to 0.5."""

    @model_validator(mode="after")
    def _room_to_fall(self) -> AdaLoRA:
        if self._starting_rank <= self.target_rank:
            raise ValueError(
                f"initial_rank {self._starting_rank} leaves nothing to prune: it must exceed target_rank, "
                f"which is {self.target_rank}"
            )
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ValueError("warmup_fraction and final_fraction take all steps; together they must stay below 1")
        return self

    def check_steps(self, total_steps: int) -> None:
        warmup, final, every = self._phases(total_steps)
        if self._has_room(total_steps):
            return
        raise MethodError(
            f"{total_steps:,} optimizer steps (total_steps) leave AdaLoRA's budget no room to fall: {warmup:,} of "
            f"warm-up, {final:,} after the last reallocation and one every {every:,} between take "
            f"{self._fewest_steps(total_steps):,}; train for more steps, or lower method.warmup_fraction, "
            "final_fraction or allocate_every"
        )

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        from peftkit.methods.adalora_allocation import Allocation

        self.check_steps(total_steps)
        model: Any = super().attach(backbone, total_steps)
        model.allocation = Allocation(model)
        adapted: nn.Module = model
        return adapted

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> AdaLoraConfig:
        from peft import AdaLoraConfig

        names = [target.name for target in targets]
        warmup, final, every = self._phases(total_steps)
        return AdaLoraConfig(
            target_r=self.target_rank,
            init_r=self._starting_rank,
            tinit=warmup,
            tfinal=final,
            deltaT=every,
            total_step=total_steps,
            beta1=self.sensitivity_smoothing,
            beta2=self.uncertainty_smoothing,
            orth_reg_weight=0.0,  # peft adds its penalty to the loss in evaluation too; `penalty` does not
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=names,
            fan_in_fan_out=are_transposed(backbone.model, names),
            modules_to_save=list(backbone.head_modules) or None,
            task_type=task_type(backbone.model),
        )

    def prepared(self, model: nn.Module) -> nn.Module:
        """Hold peft's divisor of the scale in float32, and fixed: over a bfloat16 backbone it is rounded and trains."""
        import torch

        from peftkit.methods.adalora_allocation import svd_layers

        for layer in svd_layers(model).values():
            divisor = torch.full_like(layer.ranknum[ADAPTER], self._starting_rank, dtype=torch.float32)
            layer.ranknum[ADAPTER] = torch.nn.Parameter(divisor, requires_grad=False)
        return model

    def penalty(self, model: nn.Module) -> Tensor | None:
        """γ times the mean of ‖QQᵀ − I‖_F and ‖PᵀP − I‖_F over all matrices, as the authors' code and peft have it.

        Equation 4 sums the squares instead, but the weights that the paper reports are for this mean.
        """
        if not self.orthogonality:
            return None
        import torch

        from peftkit.methods.adalora_allocation import svd_layers

        layers = svd_layers(model).values()
        products = [one.lora_A[ADAPTER] @ one.lora_A[ADAPTER].T for one in layers]
        products += [one.lora_B[ADAPTER].T @ one.lora_B[ADAPTER] for one in layers]
        identity = torch.eye(self._starting_rank, dtype=products[0].dtype, device=products[0].device)
        return self.orthogonality * torch.stack([torch.linalg.norm(one - identity) for one in products]).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Reallocate where the schedule says so.

        Raises:
            MethodError: steps out of order, gradients that are cleared already, or an overdue first reallocation.
        """
        _allocation(model).advance(model, step)

    def skipped_step(self, model: nn.Module, step: int) -> None:
        _allocation(model).skip(step)

    def may_stand_still(self, parameter: str) -> bool:
        """While a singular value is zero, as at the start and once it is not kept, its vectors have no gradient;
        `finish` checks what became of all."""
        return ".lora_" in parameter or super().may_stand_still(parameter)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Total rank, the budget that the schedule gives this step, and what `save` would write of the adapter."""
        allocation = _allocation(model)
        return {
            "total_rank": sum(allocation.ranks),
            "rank_budget": allocation.budget(model, allocation.step),
            "stored_parameters": sum(map(operator.mul, allocation.ranks, _widths(model))),
        }

    def is_settled(self, model: nn.Module) -> bool:
        return _allocation(model).is_settled(model)

    def finish(self, model: nn.Module, folder: Path | None) -> None:
        from peftkit.methods.adalora_picture import TRAJECTORY, draw_trajectory

        allocation = _allocation(model)
        allocation.check_final(model)
        if folder is not None:
            budget = partial(allocation.budget, model)
            draw_trajectory(allocation.trajectory, allocation.names, budget, allocation.step, folder / TRAJECTORY)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return _allocation(model).tensors(model)

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        _allocation(model).restore(model, state)

    def notes(self, model: nn.Module) -> dict[str, str]:
        from peftkit.methods.adalora_allocation import svd_layers

        if not hasattr(model, "allocation"):
            return {}
        kept = zip(svd_layers(model), _allocation(model).kept, strict=True)
        return {LEFT_OUT: " ".join(name for name, mask in kept if not mask.any())}

    def saved_form(self, model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        """The kept triplets as a plain LoRA.

        Raises:
            MethodError: the total rank is not the final budget, so the training was not what was asked for.
        """
        from peftkit.methods.adalora_export import as_lora

        if not hasattr(model, "allocation"):  # it was loaded, and is a LoRA already
            return super().saved_form(model)
        allocation = _allocation(model)
        allocation.check_final(model)
        return as_lora(model, allocation)

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        """The triplets that were kept are the first of each matrix; the others are as new, and the budget falls again
        from `initial_rank`: what was pruned may come back elsewhere."""
        from peftkit.methods.adalora_export import restore_lora

        restore_lora(model, folder, dropped, kept)

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Σ initial_rank · (in + out + 1) over the adapted matrices: what trains."""
        widths = self._checked_widths(model, layout)
        return self._starting_rank * sum(width + 1 for width in widths)

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        """The most that can be saved: `stored_bounds` has the least too, importance decides where between they fall."""
        return self.stored_bounds(model, layout)[1]

    def stored_bounds(self, model: nn.Module, layout: Layout) -> tuple[int, int]:
        """All the rank in the smallest matrices, each up to `initial_rank`, and all of it in the largest."""
        widths = sorted(self._checked_widths(model, layout))
        return self._filled(widths), self._filled(reversed(widths))

    @property
    def _starting_rank(self) -> int:
        return self.initial_rank or math.ceil(1.5 * self.target_rank)

    def _phases(self, total_steps: int) -> tuple[int, int, int]:
        """Steps of warm-up, steps after the last reallocation, and steps between two."""
        warmup = round(self.warmup_fraction * total_steps)
        final = max(1, round(self.final_fraction * total_steps))
        return warmup, final, self.allocate_every or max(1, (total_steps - warmup - final) // USUAL_REALLOCATIONS)

    def _has_room(self, total_steps: int) -> bool:
        warmup, final, every = self._phases(total_steps)
        return total_steps - warmup - final >= FEWEST_REALLOCATIONS * every

    def _fewest_steps(self, total_steps: int) -> int:
        """The fewest optimizer steps, beyond `total_steps`, in which the budget has room."""
        left = 1 - self.warmup_fraction - self.final_fraction
        start = int((FEWEST_REALLOCATIONS * (self.allocate_every or 1) - 1) / left)  # as if rounding took one step less
        return next(steps for steps in count(max(start, total_steps)) if self._has_room(steps))

    def _checked_widths(self, model: nn.Module, layout: Layout) -> list[int]:
        targets = self.targets_in(model, layout)
        refuse_embeddings(model, targets, "method 'adalora'")
        refuse_large_rank(self._starting_rank, targets, "initial_rank" if self.initial_rank else "target_rank")
        return [target.inputs + target.outputs for target in targets]

    def _filled(self, widths: Iterable[int]) -> int:
        """Numbers stored when the matrices take up the budget in this order."""
        ordered = list(widths)
        budget, total = self.target_rank * len(ordered), 0
        for width in ordered:
            rank = min(budget, self._starting_rank)
            budget, total = budget - rank, total + rank * width
        return total


def _allocation(model: Any) -> Allocation:
    allocation: Allocation = model.allocation
    return allocation


def _widths(model: nn.Module) -> list[int]:
    from peftkit.methods.adalora_allocation import svd_layers

    return [one.in_features + one.out_features for one in svd_layers(model).values()]
