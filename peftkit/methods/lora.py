"""LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024), through peft."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.disk import follow_umask
from peftkit.errors import ArtifactError, MethodError
from peftkit.methods.base import Method, check_trained, module_parameters, train_in_float32
from peftkit.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
}
ADAPTER = "default"


class LoRA(Method):
    """W x + scale · B A x, where A (rank × in) and B (out × rank) train and W is frozen.

    `scale` is alpha / rank, or alpha / √rank in rsLoRA; DoRA also trains the length of each output row.
    """

    artifact: ClassVar[str] = "adapter"
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

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        with quiet_libraries():
            from peft import get_peft_model

        model: Any = backbone.model
        expected = self.added_parameters(model, backbone.layout) + module_parameters(model, backbone.head_modules)
        config = self._peft_config(backbone)
        train_in_float32(model, backbone.head_modules)
        with quiet_libraries():
            peft_model: Any = get_peft_model(model, config)
        check_trained(peft_model, expected, self)
        if self._rewrites_base:
            peft_model.initial_adapter = _adapter_matrices(peft_model)
        adapted: nn.Module = peft_model
        return adapted

    def save(self, model: nn.Module, folder: Path) -> None:
        """peft's own format. An initialization that rewrote the base is saved as the LoRA of twice the rank
        that gives the same function over the untouched base: BA − B₀A₀ = [B, −B₀] [A; A₀]."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        peft_model: Any = model
        config = copy.copy(peft_model.peft_config[ADAPTER])
        state: dict[str, Tensor] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        if self._rewrites_base:
            config, state = self._over_untouched_base(config, state, peft_model.initial_adapter)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        # peft keeps targets in a set, whose order varies by process, and adds heads that it has been told already
        config.target_modules = sorted(config.target_modules)
        config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
        config.save_pretrained(folder)
        follow_umask(folder)

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        from safetensors import safe_open

        with quiet_libraries():
            from peft import PeftModel, get_peft_model_state_dict

        train_in_float32(backbone.model, backbone.head_modules)
        base: Any = backbone.model
        with quiet_libraries():
            model = PeftModel.from_pretrained(base, folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            differing = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
        if differing:
            raise ArtifactError(f"{folder} does not fit its configuration: it differs in {', '.join(differing[:3])}")
        return model.requires_grad_(False)

    def merge(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        return merged

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

    def _names(self, model: nn.Module, layout: Layout) -> list[str]:
        from peftkit.backbones.layouts import target_modules

        return target_modules(model, layout, self.targets)

    def _added(self, model: nn.Module, layout: Layout, rank: int) -> int:
        """The numbers in all B, A and DoRA lengths when B and A have this rank."""
        from peftkit.backbones.layouts import head_modules

        total, names = 0, self._names(model, layout)
        _refuse_trained_whole(names, head_modules(model))
        for name in names:
            inputs, outputs = _matrix_shape(name, model.get_submodule(name))
            if self.rank > min(inputs, outputs):
                what = f"rank {self.rank} exceeds '{name}', which is {outputs} × {inputs}"
                raise MethodError(f"{what}; lower method.rank")
            total += rank * (inputs + outputs) + (outputs if self.variant == "dora" else 0)
        return total

    def _peft_config(self, backbone: Backbone) -> LoraConfig:
        from peft import LoraConfig

        name = type(backbone.model).__name__
        task_type = next((task for suffix, task in TASK_TYPES.items() if name.endswith(suffix)), None)
        targets = self._names(backbone.model, backbone.layout)
        _refuse_trained_whole(targets, backbone.head_modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=_are_transposed(backbone.model, targets),
            modules_to_save=list(backbone.head_modules) or None,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            init_lora_weights=True if self.initialization == "default" else self.initialization,  # type: ignore[arg-type]
            task_type=task_type,
        )

    def _over_untouched_base(
        self, config: LoraConfig, state: dict[str, Tensor], initial: dict[str, Tensor]
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        import torch

        config.r = 2 * self.rank
        # the scale must stay: alpha / rank doubles both, alpha / √rank grows by √2
        config.lora_alpha = self.alpha * (math.sqrt(2) if self.variant == "rslora" else 2)  # type: ignore[assignment]
        config.init_lora_weights = True
        state = dict(state)
        for name, start in initial.items():
            start = start.to(state[name].device)
            is_a = ".lora_A." in name
            state[name] = torch.cat([state[name], start if is_a else -start], dim=0 if is_a else 1)
        return config, state


def _refuse_trained_whole(targets: list[str], heads: tuple[str, ...]) -> None:
    """Refuse low-rank updates of what is trained and saved as a whole anyway."""
    for name in targets:
        if any(f"{name}.".startswith(f"{head}.") for head in heads):
            raise MethodError(f"target '{name}' is in the head, which trains as a whole; leave it out of the targets")


def _are_transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether the weights are (in, out), as GPT-2's are; said outright, or peft warns that it found out."""
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def _matrix_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or an embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise MethodError(f"LoRA adapts linear layers and embeddings; '{name}' is a {type(module).__name__}")


def _adapter_matrices(model: PeftModel) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: t.detach().clone() for name, t in state.items() if ".lora_A." in name or ".lora_B." in name}
