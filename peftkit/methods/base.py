"""What every method provides, and the one place where it is decided whether a parameter trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from peftkit.errors import ArtifactError, MethodError
from peftkit.schema import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.quantization import Quantization
    from peftkit.tasks.base import Task


class Method(Section, ABC):
    """Hyperparameters, plus what they do to a backbone."""

    artifact: ClassVar[str]
    """The sub-folder of a run that `save` writes to."""
    trains: ClassVar[bool] = True
    """False: nothing is optimised and no weights are saved."""
    trains_backbone: ClassVar[bool] = False
    """What trains is as large as blocks of the backbone; where processes share the model out, it is shared out too."""
    size: ClassVar[str | None] = None
    """The hyperparameter that sets how many parameters are added, such as `rank`."""
    free: ClassVar[frozenset[str]] = frozenset({"start_from", "fresh_head", "dropout"})
    """Settings that may be others than those of the run that is continued: the function does not depend on them."""
    kind: str
    start_from: Annotated[str, Field(min_length=1)] | None = None
    """The folder of a finished run of this method on this backbone: training goes on from its weights, with a schedule
    and an optimizer of its own."""
    fresh_head: bool = False
    """With `start_from`: leave the head as it was drawn, as for other labels."""

    @model_validator(mode="after")
    def _fresh_beside_what(self) -> Self:
        if self.start_from is not None and not self.trains:
            raise ValueError(f"start_from: method '{self.kind}' trains and saves no weights; leave it out")
        if self.fresh_head and self.start_from is None:
            raise ValueError("fresh_head is for start_from, and without that every head is fresh; leave it out")
        return self

    @abstractmethod
    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        """The model to train: only what the method names, and the head, has `requires_grad`.

        Raises:
            MethodError: a target matches nothing, or the method does not fit the architecture or the steps.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into `folder` (which exists and is empty)."""

    @abstractmethod
    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        """The trained model for inference: `backbone` plus what `save` wrote."""

    def restore(self, model: nn.Module, folder: Path, dropped: Sequence[str], kept: Sequence[str]) -> None:
        """Put what `save` wrote into an attached model, which then computes what the saved one did, and trains.

        Args:
            dropped: saved modules that are left out, such as a head with other labels.
            kept: modules of `model` that stay as they are in their place.

        Raises:
            MethodError: what was saved does not fit, or does not hold all that trained.
        """
        raise MethodError(f"method '{self.kind}' cannot go on from a saved run; leave method.start_from out")

    def refuse_other(self, saved: Method) -> None:
        """Refuse to go on from a run with other settings, in which the same weights would compute something else.

        Raises:
            MethodError: names the setting and both values.
        """
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(saved, name)
            if name not in self.free and ours != theirs:
                raise MethodError(f"its method.{name} is {theirs!r}, not {ours!r}; set method.{name} to what it was")

    @abstractmethod
    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model that computes what `model` computes. Consumes `model`.

        Raises:
            NotMergeable: says why, and what to ship instead.
        """

    @abstractmethod
    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        """Parameters that the method adds to `model` (which may be on the meta device), in closed form."""

    def stored_parameters(self, model: nn.Module, layout: Layout) -> int:
        """What `save` writes for the added parameters; more of them than train where the base was rewritten."""
        return self.added_parameters(model, layout)

    def stored_bounds(self, model: nn.Module, layout: Layout) -> tuple[int, int]:
        """The least and the most that `save` writes for the added parameters; they differ where training decides."""
        stored = self.stored_parameters(model, layout)
        return stored, stored

    def tuned_parameters(self, model: nn.Module, heads: tuple[str, ...]) -> int:
        """Parameters of the backbone itself that the method trains."""
        return 0

    def virtual_tokens(self) -> int:
        """Positions in front of every input that the method takes for itself."""
        return 0

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        """Why this method cannot run so; empty when it can."""
        return []

    def check_steps(self, total_steps: int) -> None:
        """Refuse a training that is too short for the method's schedule.

        Raises:
            MethodError: says how many steps there are and how many it takes.
        """
        return

    def learning_rate_factor(self, parameter: str) -> float:
        """What the learning rate is multiplied by for the parameter of this name."""
        return 1.0

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar that is added to the training loss, and to no other."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each optimizer step (the first is 1), before gradients are cleared."""
        return

    def skipped_step(self, model: nn.Module, step: int) -> None:
        """Called instead of `after_step` when the optimizer left a step out, as it does in fp16 after an overflow."""
        return

    def may_stand_still(self, parameter: str) -> bool:
        """Whether a parameter that trains may stay as it is without anything being wrong.

        Embeddings of new tokens may: the first batches need not hold them.
        """
        return "new_tokens" in parameter.split(".")

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What the log shows of the method at every step."""
        return {}

    def is_settled(self, model: nn.Module) -> bool:
        """Whether the weights have the form that will be saved; before that none are kept as the best."""
        return True

    def finish(self, model: nn.Module, folder: Path | None) -> None:
        """Called when training has ended: check that the method did what it is for, and draw it into `folder`.

        Args:
            folder: the run folder; None in all processes but the first.

        Raises:
            MethodError: it did not.
        """
        return

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the trained parameters."""
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        return


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor, by its full name or by peft's, belongs to one of the named modules."""
    return any(f".{module}." in f".{name}" for module in modules)


def check_fit(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors that are not exactly the expected ones by name and shape.

    Raises:
        MethodError: names one that differs.
    """
    for name in sorted(expected.keys() | saved.keys()):
        ours, theirs = (tuple(one[name].shape) if name in one else None for one in (expected, saved))
        if ours != theirs:
            shapes = [str(shape) if shape else "missing" for shape in (theirs, ours)]
            raise MethodError(f"its '{name}' is {shapes[0]}, and {shapes[1]} here; set the method to what it was")


def refuse_nan(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse saved weights that are not numbers.

    Raises:
        ArtifactError: names one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(f"{file}: '{name}' holds NaN or infinity; restore the file, or train again")


def train_only(model: nn.Module, modules: Iterable[str]) -> None:
    """Freeze everything but the parameters inside the named modules.

    Raises:
        MethodError: a name matches no parameter.
    """
    prefixes = tuple(f"{name}." for name in modules)
    model.requires_grad_(False)
    matched = set()
    for name, parameter in model.named_parameters():
        for prefix in prefixes:
            if name.startswith(prefix):
                parameter.requires_grad_(True)
                matched.add(prefix)
    lost = set(prefixes) - matched
    if lost:
        raise MethodError(f"nothing to train in {', '.join(sorted(p[:-1] for p in lost))}: no such parameters")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in model order; a tied parameter once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The values of the parameters that train, as safetensors takes them."""
    return {name: p.detach().contiguous().cpu() for name, p in trained_parameters(model).items()}


def check_trained(model: nn.Module, expected: int, method: Method) -> None:
    """Refuse a model whose trained parameters are not exactly those that were asked for."""
    found = sum(map(numel, trained_parameters(model).values()))
    if found != expected:
        raise MethodError(
            f"method '{method.kind}' should train {expected:,} parameters but {found:,} have gradients; "
            "this is a fault of peftkit for this architecture: please report it with `peftkit env`"
        )


def train_in_float32(model: nn.Module, modules: Iterable[str]) -> None:
    """Hold the named modules in float32 and cast what they are given.

    A step of bfloat16 weights smaller than 1/256 of the weight rounds to nothing, so a head held so barely learns.
    """
    import torch

    for name in modules:
        module = model.get_submodule(name)
        if any(p.dtype != torch.float32 for p in module.parameters()):
            module.float().register_forward_pre_hook(_inputs_in_own_dtype)


def _inputs_in_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch import is_floating_point, is_tensor

    dtype = next(module.parameters()).dtype  # a merged model may have been cast since
    return tuple(one.to(dtype) if is_tensor(one) and is_floating_point(one) else one for one in inputs)


def module_parameters(model: nn.Module, names: Iterable[str]) -> int:
    """Parameters inside the named modules."""
    return sum(numel(p) for name in names for p in model.get_submodule(name).parameters())


def numel(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two or more of them into one element."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def lost_to_rounding(kind: str, dtype: str) -> str:
    """Why weights of the backbone held in `dtype` cannot train; empty when they can."""
    if dtype == "float32":
        return ""
    return (
        f"method '{kind}' trains weights of the backbone itself; in {dtype} it loses every step that is smaller "
        "than their rounding; set backbone.dtype: float32 (and training.precision: bf16 for speed)"
    )
