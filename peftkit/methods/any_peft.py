"""Every other method that peft has, by peft's name for it and with the fields of its configuration."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from peftkit.backbones.load import Backbone
from peftkit.backbones.modules import head_modules, named, norms, number_free_tails
from peftkit.backbones.quantization import Quantization, refuse_quantized
from peftkit.backbones.targets import Target
from peftkit.errors import ArtifactError, MethodError, NotMergeable, PeftkitError, first_line
from peftkit.methods.base import lost_to_rounding, module_parameters, trained_parameters
from peftkit.methods.from_peft import FromPeft, adapter_state, are_transposed, quiet_peft, task_type
from peftkit.methods.ia3 import scales_input
from peftkit.methods.peft_configs import checked_fields, config_class, field_names, has_packed_layers
from peftkit.quiet import quiet_libraries
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.tasks.base import Task

WITHOUT_LINEAR = ("ln_tuning", "trainable_tokens")
"""Types that adapt no linear layer."""
STREAMS = "random_streams_sha256"


class Peft(FromPeft):
    """Any of peft's methods that adapts modules: `type: loha`, `oft`, `hra`, `fourierft`, `ln_tuning`, …

    All other keys are fields of that type's configuration class in peft (`r`, `alpha`, …), with peft's defaults; they
    are checked against the installed peft when the run starts. What trains is counted on a copy without weights.
    """

    model_config = ConfigDict(extra="allow")

    kind: Literal["peft"] = "peft"
    type: str
    """peft's name of the method."""
    targets: str | tuple[str, ...] | None = None
    """Default: `all`; every normalisation for `ln_tuning`, the word embeddings for `trainable_tokens`."""

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        if self.type.lower() in WITHOUT_LINEAR or has_packed_layers(self.type):
            return []
        return refuse_quantized(f"method 'peft': type '{self.type}' reads the backbone's weights in peft", quantization)

    def peft_config(self, backbone: Backbone, targets: list[Target], total_steps: int) -> PeftConfig:
        names = [target.name for target in targets]
        filled_in = {
            "task_type": task_type(backbone.model),
            "target_modules": names,
            "fan_in_fan_out": are_transposed(backbone.model, names),
            "modules_to_save": list(backbone.head_modules) or None,
            "feedforward_modules": [one.name for one in targets if scales_input(one, backbone.layout)],
        }
        given = checked_fields(self.type, self.model_extra or {})
        _refuse_unmatched(given, names)
        fields = {name: value for name, value in filled_in.items() if name in self._fields} | given
        config: PeftConfig = config_class(self.type)(**fields)
        return config

    def targets_in(self, model: nn.Module, layout: Layout) -> list[Target]:
        if "target_modules" not in self._fields:
            if self.targets is not None:
                raise MethodError(f"type '{self.type}' has no targets; leave method.targets out")
            return []
        if self.type.lower() == "ln_tuning":
            return _norms(model, self.targets)
        if self.targets is not None:
            return super().targets_in(model, layout)
        default = _word_embeddings(model) if self.type.lower() == "trainable_tokens" else "all"
        return self.model_copy(update={"targets": default}).targets_in(model, layout)

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        before = _sums(backbone.model)
        with self._told_by_peft():
            model = super().attach(backbone, total_steps)
        self._check_trained(model)
        changed = [name for name, sums in _sums(model).items() if before.get(_plain(name), sums) != sums]
        if changed:
            raise MethodError(
                f"type '{self.type}' with these fields rewrites the backbone ('{_plain(changed[0])}'), and what it "
                "saves would not fit the untouched one; leave out the field that does it"
            )
        return model

    def saved_form(self, model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Random matrices that several modules share are saved with each, as peft wants to find them."""
        config, state = super().saved_form(model)
        return config, {name: tensor.detach().clone() for name, tensor in state.items()}

    def merge(self, model: nn.Module) -> nn.Module:
        try:
            return super().merge(model)
        except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
            raise NotMergeable(
                f"peft does not merge type '{self.type}' here ({first_line(error)}); ship the run folder, which "
                "`peftkit predict` and peft load, or with its backbone as what `peftkit bundle RUN OUT` writes"
            ) from error

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """What peft makes trainable outside the head, counted in the model that it builds."""
        found = trained_parameters(self._on_meta(model, layout))
        return sum(p.numel() for name, p in found.items() if ".modules_to_save." not in name)

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        state = adapter_state(self._on_meta(model, layout))
        return sum(tensor.numel() for tensor in state.values()) - module_parameters(model, head_modules(model))

    def notes(self, model: nn.Module) -> dict[str, str]:
        import torch

        return {STREAMS: _streams().hexdigest(), "torch_version": str(torch.__version__)} if self._draws_again else {}

    def check_notes(self, model: nn.Module, notes: dict[str, str], folder: Path) -> None:
        if self._draws_again and notes.get(STREAMS) != _streams().hexdigest():
            raise ArtifactError(
                f"type '{self.type}' draws parts of {folder} again, and torch draws other numbers here than where it "
                f"was trained; load it with torch {notes.get('torch_version', 'of that time')}"
            )

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        import torch

        return {STREAMS: torch.tensor(list(_streams().digest()), dtype=torch.uint8)} if self._draws_again else {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        import torch

        if self._draws_again and not torch.equal(state[STREAMS].cpu(), self.state(model)[STREAMS]):
            raise MethodError(
                f"type '{self.type}' is built from random numbers, and torch draws others here than in the checkpoint; "
                "resume with the version that started the run, or start again with output.overwrite=true"
            )

    @property
    def _fields(self) -> set[str]:
        return field_names(self.type)

    @property
    def _draws_again(self) -> bool:
        """Whether something random of it is drawn from a seed on loading instead of being saved."""
        return any("seed" in name or "prng" in name for name in self._fields)

    def _on_meta(self, model: nn.Module, layout: Layout) -> nn.Module:
        """The peft model of the same shapes, without weights; torch's generator is left as it was."""
        import torch

        with quiet_libraries():
            from peft import get_peft_model
            from peft.tuners.tuners_utils import BaseTunerLayer

        heads = head_modules(model)
        if heads and "modules_to_save" not in self._fields:
            raise MethodError(
                f"type '{self.type}' cannot train and save a head ({', '.join(heads)}) beside it; use it for language "
                "models, or choose another type"
            )
        backbone = Backbone(_without_weights(model), None, layout, heads)
        with self._told_by_peft(), quiet_libraries(), quiet_peft(), torch.random.fork_rng(devices=[]):
            targets = self._split(backbone)
            kinds = {target.name: type(backbone.model.get_submodule(target.name)).__name__ for target in targets}
            base: Any = backbone.model
            adapted: nn.Module = get_peft_model(base, self.peft_config(backbone, targets, total_steps=1))
        for name, kind in kinds.items():
            if not isinstance(adapted.get_submodule(f"base_model.model.{name}"), BaseTunerLayer):
                raise MethodError(f"type '{self.type}' adds nothing to '{name}', a {kind}, and peft does not say so")
        return adapted

    def _check_trained(self, model: nn.Module) -> None:
        """Refuse what would train in vain: in a dtype that rounds its steps away, or left out of the file."""
        saved = {tensor.data_ptr() for tensor in adapter_state(model).values()}
        for name, parameter in trained_parameters(model).items():
            if conflict := lost_to_rounding(self.type, str(parameter.dtype).removeprefix("torch.")):
                raise MethodError(f"{conflict} ('{_plain(name)}')")
            if parameter.data_ptr() not in saved:
                raise MethodError(
                    f"type '{self.type}' trains '{_plain(name)}', which this version of peft does not save"
                )

    @contextlib.contextmanager
    def _told_by_peft(self) -> Iterator[None]:
        """peft's refusals, which are of many kinds, as ours."""
        try:
            yield
        except PeftkitError:
            raise
        except Exception as error:
            reason = first_line(error)
            if isinstance(error, NotImplementedError) and "meta" in reason:
                reason = "what it adds depends on the weights' values, so it cannot be counted before they load"
            raise MethodError(f"peft cannot put type '{self.type}' on this model: {reason}") from error


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, made without copying weights."""
    import torch
    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _norms(model: nn.Module, targets: str | tuple[str, ...] | None) -> list[Target]:
    """The normalisations that are named, or all outside the head."""
    heads = tuple(f"{head}." for head in head_modules(model))
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in norms(model).items()
        if not name.startswith(heads)
    }
    chosen = set() if targets else set(sizes)
    for entry in targets.split("+") if isinstance(targets, str) else targets or ():
        found = named(sizes, entry.strip())
        if not found:
            raise MethodError(f"target '{entry}' is no normalisation of the model{did_you_mean(entry, sizes)}")
        chosen |= found
    return [Target(name, size, size) for name, size in sizes.items() if name in chosen]


def _refuse_unmatched(given: dict[str, Any], targets: list[str]) -> None:
    """Refuse keys of `rank_pattern` and its like that are no target, which peft would pass over."""
    for field, patterns in given.items():
        for pattern in patterns if field.endswith("_pattern") and isinstance(patterns, dict) else ():
            if not any(re.match(rf"(.*\.)?({pattern})$", target) for target in targets):
                near = did_you_mean(pattern, number_free_tails(targets))
                raise MethodError(f"{field}: '{pattern}' is no target{near}")


def _word_embeddings(model: nn.Module) -> str:
    transformer: Any = model
    embeddings = transformer.get_input_embeddings()
    return next(name for name, part in model.named_modules() if part is embeddings)


def _plain(name: str) -> str:
    """A parameter's name in the untouched model."""
    return name.replace(".base_layer", "").replace(".original_module", "").removeprefix("base_model.model.")


def _sums(model: nn.Module) -> dict[str, str]:
    """Two figures of each parameter, as text, which also equals itself where they are not numbers."""
    import torch

    sums = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        sums[name] = f"{values.sum(dtype=torch.float64)} {values.abs().sum(dtype=torch.float64)}"
    return sums


def _streams() -> Any:
    """A hash of what torch draws from a fixed seed on the CPU, where peft draws."""
    import torch

    source = torch.Generator().manual_seed(0)
    drawn = (torch.rand(99, generator=source), torch.randn(99, generator=source), torch.randperm(99, generator=source))
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in drawn))
