"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024) and LoRA+ (Hayou et al. 2024), by peft."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.backbones.quantization import Quantization, refuse_quantized
from peftkit.errors import MethodError
from peftkit.methods.from_peft import FromPeft, adapter_state, are_transposed, refuse_embeddings, task_type

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.targets import Target
    from peftkit.tasks.base import Task

_INITIALIZATIONS = r"default|gaussian|orthogonal|pissa|pissa_niter_\d+|olora|mica"
_LEFT_OUT = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "is computed from batches of data, which a method does not see"),
    "loftq": "quantises the backbone itself, and its files would not fit the untouched one",
}


class LoRA(FromPeft):
    """W x + scale · B A x, where A (rank × in) and B (out × rank) train and W is frozen.

    `scale` is alpha / rank, or alpha / √rank in rsLoRA; DoRA also trains the length of each output row. What else
    peft's LoraConfig has (ranks of their own for some modules, a bias beside B, …) is under `kind: peft`, `type: lora`.
    """

    size: ClassVar[str | None] = "rank"
    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all"
    """`query_value`, `attention`, `all`, or roles and module names, joined by `+` or as a list."""
    variant: Literal["plain", "rslora", "dora", "rslora_dora"] = "plain"
    """`rslora_dora` is DoRA with the scale of rsLoRA."""
    initialization: str = "default"
    """`default`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_<n>`, `olora`, or `mica`, in which B holds the last
    left singular vectors of W and only A trains. PiSSA and OLoRA move a part of W into B A, so that W changes."""
    b_learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+: B's learning rate as a multiple of A's and of everything else's; the paper's is 16."""

    @field_validator("initialization")
    @classmethod
    def _known_initialization(cls, value: str) -> str:
        choice = "default, gaussian, orthogonal, olora, pissa, pissa_niter_<n>, mica"
        if value in _LEFT_OUT:
            raise ValueError(f"'{value}' {_LEFT_OUT[value]}; use one of: {choice}")
        if not re.fullmatch(_INITIALIZATIONS, value):
            raise ValueError(f"'{value}' is not an initialization; it can be: {choice}")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> LoRA:
        if self.start_from is not None and self._rewrites_base:
            raise ValueError(
                f"initialization {self.initialization} moves a part of the backbone into a new adapter, and start_from "
                "brings a trained one; leave initialization out"
            )
        if self.initialization == "orthogonal" and self.rank % 2:
            raise ValueError(f"orthogonal initialization needs an even rank, not {self.rank}")
        if self._freezes_b and self._has_lengths:
            raise ValueError(
                f"initialization mica keeps B fixed, which peft does not combine with DoRA (variant {self.variant})"
            )
        if self._freezes_b and self.b_learning_rate_factor != 1:
            raise ValueError("b_learning_rate_factor has nothing to do: with initialization mica, B does not train")
        return self

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        start = f"method '{self.kind}': initialization {self.initialization}"
        if self._rewrites_base or self._freezes_b:
            return refuse_quantized(f"{start} takes the backbone's weights apart", quantization)
        if self.initialization == "orthogonal":
            return refuse_quantized(f"{start} is drawn by peft in the dtype of the backbone's weights", quantization)
        return []

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
            use_rslora=self._scales_by_root,
            use_dora=self._has_lengths,
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
        if self._freezes_b:
            config.init_lora_weights = True  # B is in the file: loading need not decompose W for it
        if not self._rewrites_base:
            return config, state
        config.r = 2 * self.rank
        # the scale must stay: alpha / rank doubles both, alpha / √rank grows by √2
        config.lora_alpha = self.alpha * (math.sqrt(2) if self._scales_by_root else 2)
        config.init_lora_weights = True
        peft_model: Any = model
        for name, start in peft_model.initial_adapter.items():
            start = start.to(state[name].device)
            is_a = ".lora_A." in name
            state[name] = torch.cat([state[name], start if is_a else -start], dim=0 if is_a else 1)
        return config, state

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Σ rank · (in + out) over the adapted matrices, rank · in where B is fixed; DoRA adds out each."""
        return self._count(model, layout, self.rank, 0 if self._freezes_b else self.rank)

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        rank = 2 * self.rank if self._rewrites_base else self.rank
        return self._count(model, layout, rank, rank)

    def learning_rate_factor(self, parameter: str) -> float:
        return self.b_learning_rate_factor if ".lora_B." in parameter else 1.0

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What was decomposed from W, which another machine may decompose otherwise."""
        if self._freezes_b:
            return {name: t.detach().clone().cpu() for name, t in _fixed_matrices(model).items()}
        peft_model: Any = model
        return dict(peft_model.initial_adapter) if self._rewrites_base else {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        if self._freezes_b:
            for name, matrix in _fixed_matrices(model).items():
                matrix.data.copy_(state[name])
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
    def _scales_by_root(self) -> bool:
        return self.variant.startswith("rslora")

    @property
    def _has_lengths(self) -> bool:
        return self.variant.endswith("dora")

    @property
    def _rewrites_base(self) -> bool:
        return self.initialization.startswith(("pissa", "olora"))

    @property
    def _freezes_b(self) -> bool:
        return self.initialization == "mica"

    def _count(self, model: nn.Module, layout: Layout, rows_of_a: int, columns_of_b: int) -> int:
        """The numbers in all A, B and DoRA lengths."""
        targets = self.targets_in(model, layout)
        refuse_large_rank(self.rank, targets)
        if self.initialization not in ("default", "mica"):
            refuse_embeddings(model, targets, f"initialization '{self.initialization}'")
        if self.initialization == "olora":
            self._refuse_transposed(model, targets)
        lengths = sum(target.outputs for target in targets) if self._has_lengths else 0
        return sum(rows_of_a * target.inputs + columns_of_b * target.outputs for target in targets) + lengths

    def _refuse_transposed(self, model: nn.Module, targets: list[Target]) -> None:
        """peft decomposes such weights the wrong way round, which changes the function where they are square."""
        for target in targets:
            if target.fused_in is None and are_transposed(model, [target.name]):
                raise MethodError(
                    f"initialization 'olora': peft does not have it for '{target.name}', whose weights are (in, out); "
                    "use pissa, which starts from the same function too"
                )


def refuse_large_rank(rank: int, targets: list[Target], field: str = "rank") -> None:
    """Refuse a rank that a target's matrix cannot have.

    Raises:
        MethodError: names the matrix and its shape.
    """
    for target in targets:
        if rank > min(target.inputs, target.outputs):
            what = f"rank {rank} exceeds '{target.name}', which is {target.outputs} × {target.inputs}"
            raise MethodError(f"{what}; lower method.{field}")


def _fixed_matrices(model: nn.Module) -> dict[str, Any]:
    """The B of every target, of linear layers and of embeddings."""
    return {name: p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}


def _adapter_matrices(model: PeftModel) -> dict[str, Any]:
    state = adapter_state(model)
    return {name: t.detach().clone() for name, t in state.items() if ".lora_A." in name or ".lora_B." in name}
