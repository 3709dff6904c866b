"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024), through peft."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.errors import MethodError
from peftkit.methods.from_peft import FromPeft, adapter_state, are_transposed, task_type

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.targets import Target


class LoRA(FromPeft):
    """W x + scale · B A x, where A (rank × in) and B (out × rank) train and W is frozen.

    `scale` is alpha / rank, or alpha / √rank in rsLoRA; DoRA also trains the length of each output row.
    """

    size: ClassVar[str | None] = "rank"
    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all"
    """`query_value`, `attention`, `all`, or roles and module names, joined by `+` or as a list."""
    variant: Literal["plain", "rslora", "dora"] = "plain"
    initialization: str = "default"
    """`default`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_<n>` or `olora`."""

    @field_validator("initialization")
    @classmethod
    def _known_initialization(cls, value: str) -> str:
        if not re.fullmatch(r"default|gaussian|orthogonal|pissa|pissa_niter_\d+|olora", value):
            raise ValueError(
                f"'{value}' is not an initialization; it can be: default, gaussian, orthogonal, olora, "
                "pissa, pissa_niter_<n>"
            )
        return value

    @model_validator(mode="after")
    def _even_rank(self) -> LoRA:
        if self.initialization == "orthogonal" and self.rank % 2:
            raise ValueError(f"orthogonal initialization needs an even rank, not {self.rank}")
        return self

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> LoraConfig:
        from peft import LoraConfig

        names = [target.name for target in targets]
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=names,
            fan_in_fan_out=are_transposed(backbone.model, names),
            modules_to_save=list(backbone.head_modules) or None,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            init_lora_weights=True if self.initialization == "default" else self.initialization,  # type: ignore[arg-type]
            task_type=task_type(backbone.model),
        )

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        model: Any = super().attach(backbone, total_steps)
        if self._rewrites_base:
            model.initial_adapter = _adapter_matrices(model)
        adapted: nn.Module = model
        return adapted

    def saved_form(self, model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        """An initialization that rewrote the base is saved as the LoRA of twice the rank that gives the same
        function over the untouched base: BA − B₀A₀ = [B, −B₀] [A; A₀]."""
        import torch

        config: Any
        config, state = super().saved_form(model)
        if not self._rewrites_base:
            return config, state
        config.r = 2 * self.rank
        # the scale must stay: alpha / rank doubles both, alpha / √rank grows by √2
        config.lora_alpha = self.alpha * (math.sqrt(2) if self.variant == "rslora" else 2)
        config.init_lora_weights = True
        peft_model: Any = model
        for name, start in peft_model.initial_adapter.items():
            start = start.to(state[name].device)
            is_a = ".lora_A." in name
            state[name] = torch.cat([state[name], start if is_a else -start], dim=0 if is_a else 1)
        return config, state

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Σ rank · (in + out) over the adapted matrices; DoRA adds out each."""
        return self._added(model, layout, self.rank)

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        return self._added(model, layout, 2 * self.rank if self._rewrites_base else self.rank)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        peft_model: Any = model
        return dict(peft_model.initial_adapter) if self._rewrites_base else {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        if not self._rewrites_base:
            return
        import torch

        # The residual in the base belongs to the initial matrices of the first process, bit for bit.
        peft_model: Any = model
        for name, initial in peft_model.initial_adapter.items():
            if not torch.equal(initial.cpu(), state[name].cpu()):
                raise MethodError(
                    f"'{self.initialization}' gave other initial matrices here than in the checkpoint ({name}); "
                    "resume on the machine that started the run, or start again with output.overwrite=true"
                )

    @property
    def _rewrites_base(self) -> bool:
        return self.initialization.startswith(("pissa", "olora"))

    def _added(self, model: nn.Module, layout: Layout, rank: int) -> int:
        """The numbers in all B, A and DoRA lengths when B and A have this rank."""
        targets = self.targets_in(model, layout)
        refuse_large_rank(self.rank, targets)
        lengths = sum(target.outputs for target in targets) if self.variant == "dora" else 0
        return sum(rank * (target.inputs + target.outputs) for target in targets) + lengths


def refuse_large_rank(rank: int, targets: list[Target], field: str = "rank") -> None:
    """Refuse a rank that a target's matrix cannot have.

    Raises:
        MethodError: names the matrix and its shape.
    """
    for target in targets:
        if rank > min(target.inputs, target.outputs):
            what = f"rank {rank} exceeds '{target.name}', which is {target.outputs} × {target.inputs}"
            raise MethodError(f"{what}; lower method.{field}")


def _adapter_matrices(model: PeftModel) -> dict[str, Any]:
    state = adapter_state(model)
    return {name: t.detach().clone() for name, t in state.items() if ".lora_A." in name or ".lora_B." in name}
