"""Which singular triplets of an AdaLoRA model are kept: importance, reallocation, and the record of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError
from peftkit.methods.from_peft import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn

CALLS = "method.after_step(model, step) must be called after every optimizer step, from step 1 to the last"
PARTS = ("lora_A", "lora_E", "lora_B")
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class Reallocation:
    """The ranks that all matrices, in model order, had from this step on."""

    step: int
    budget: int
    ranks: tuple[int, ...]


class Allocation:
    """The kept triplets of a model, step by step.

    peft's allocator averages sensitivity and uncertainty and knows the budget of each step. Who is kept is decided
    here: peft masks everything up to a threshold score, and so too much where scores tie; it never comes to its
    final budget when just that step is skipped, as fp16 does; and its record of it all is lost with the process.
    """

    def __init__(self, model: nn.Module) -> None:
        import torch

        layers = svd_layers(model)
        self.names = tuple(layers)
        self.kept = [torch.ones(len(one.lora_E[ADAPTER]), dtype=torch.bool) for one in layers.values()]
        self.history: list[Reallocation] = []
        self.step = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each matrix, in model order."""
        return self.history[-1].ranks if self.history else tuple(map(len, self.kept))

    @property
    def trajectory(self) -> list[Reallocation]:
        """The ranks at the start, and those after every reallocation."""
        start = tuple(map(len, self.kept))
        return [Reallocation(0, sum(start), start), *self.history]

    def budget(self, model: nn.Module, step: int) -> int:
        """The total rank that the schedule allows at a step."""
        return int(_allocator(model).budget_schedule(step)[0])

    def is_settled(self, model: nn.Module) -> bool:
        """Whether the final budget was allocated."""
        return bool(self.history) and self.history[-1].step >= _last_allocation(_allocator(model).peft_config)

    def advance(self, model: nn.Module, step: int) -> None:
        """Take in the gradients of an optimizer step and reallocate where the schedule says so."""
        allocator = _allocator(model)
        config = allocator.peft_config
        self._check_order(step, config)
        last = _last_allocation(config)
        if self.is_settled(model):
            self._mask(model)  # the optimizer's momentum still moves what was dropped
        elif step >= last:
            self._reallocate(model, step, allocator.target_bgt)
            allocator.reset_ipt()
        else:
            _refuse_no_gradients(model)
            allocator.update_ipt(_adapted(model))
            if step >= self._next(config):
                self._reallocate(model, step, allocator.budget_schedule(step)[0])
        self.step = step

    def skip(self, step: int) -> None:
        """Leave out a step that the optimizer did not take; a reallocation due at it comes with the next one."""
        self.step = step

    def check_final(self, model: nn.Module) -> None:
        """Refuse a model whose total rank is not the final budget.

        Raises:
            MethodError: says which rank it has and which it should have.
        """
        config, target = _allocator(model).peft_config, _allocator(model).target_bgt
        layers = zip(svd_layers(model).values(), self.kept, strict=True)
        found = sum(int((mask.to((e := one.lora_E[ADAPTER]).device) | (e[:, 0] != 0)).sum()) for one, mask in layers)
        if not self.is_settled(model):
            raise MethodError(
                f"the total rank is still {found}, not {target}: the last step seen is {self.step:,} of "
                f"{config.total_step:,}, and the last reallocation is due at step {_last_allocation(config):,}; {CALLS}"
            )
        if found != target:
            raise MethodError(f"the total rank is {found} at the end, not the budget of {target}; {CALLS}")

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Everything that decides or tells how it goes on, for a checkpoint."""
        import torch

        rows = [[one.step, one.budget, *one.ranks] for one in self.history]
        history = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 2 + len(self.names))
        state = {"step": torch.tensor([self.step]), "history": history, "kept": torch.cat(self.kept).cpu()}
        if not self.is_settled(model):
            state |= _averages(model)
        return state

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        self.step = int(state["step"])
        self.history = [Reallocation(step, budget, tuple(rest)) for step, budget, *rest in state["history"].tolist()]
        self.kept = list(state["kept"].split([len(mask) for mask in self.kept]))
        allocator = _allocator(model)
        allocator.reset_ipt()
        if self.is_settled(model):
            return
        for name, parameter in _lora_parameters(model).items():
            # peft starts averages anew for names that it has no last sensitivity of, and reads it for nothing else
            allocator.ipt[name] = parameter.new_zeros(())
            for average in AVERAGES:
                getattr(allocator, average)[name] = state[f"{average}.{name}"].to(parameter.device)

    def _next(self, config: Any) -> int:
        """The step of the next reallocation before the last: the first multiple of deltaT after the one before."""
        before = max(self.history[-1].step if self.history else 0, config.tinit)
        return int(before // config.deltaT + 1) * int(config.deltaT)

    def _check_order(self, step: int, config: Any) -> None:
        if step <= self.step:
            raise MethodError(f"step {step} follows step {self.step}; count optimizer steps, the first is 1: {CALLS}")
        due = config.tinit + config.deltaT
        if not self.history and self.step < due < step:
            raise MethodError(
                f"no reallocation had happened by step {due:,}, when the first was due (step {step:,} follows step "
                f"{self.step:,}); {CALLS}, and a resumed model needs method.load_state"
            )

    def _reallocate(self, model: nn.Module, step: int, budget: int) -> None:
        scores = triplet_scores(model)
        self.kept = kept_triplets(scores, budget)
        self._mask(model)
        ranks = [int(mask.sum()) for mask in self.kept]
        self.history.append(Reallocation(step, budget, tuple(ranks)))

    def _mask(self, model: nn.Module) -> None:
        for layer, mask in zip(svd_layers(model).values(), self.kept, strict=True):
            singular = layer.lora_E[ADAPTER].data
            singular.masked_fill_(~mask.to(singular.device)[:, None], 0.0)


def svd_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted projections by their name in the transformers model, in model order."""
    from peft.tuners.adalora import AdaLoraLayer

    return {name: part for name, part in _adapted(model).named_modules() if isinstance(part, AdaLoraLayer)}


def triplet_scores(model: nn.Module) -> list[Tensor]:
    """Importance of each triplet, a vector of (rank,) for each matrix (equation 11).

    That of the singular value, plus the means over the entries of its two vectors; of an entry it is the product of
    smoothed sensitivity and smoothed uncertainty.

    Raises:
        MethodError: all are zero.
    """
    averages, scores = _averages(model), []
    for name in svd_layers(model):
        entries = (f"{name}.{part}.{ADAPTER}" for part in PARTS)
        a, e, b = (averages[f"exp_avg_ipt.{entry}"] * averages[f"exp_avg_unc.{entry}"] for entry in entries)
        scores.append(e[:, 0] + a.mean(dim=1) + b.mean(dim=0))
    if not any(bool(one.any()) for one in scores):
        raise MethodError(f"the importance of every weight is zero; {CALLS}, before gradients are cleared")
    return scores


def kept_triplets(scores: list[Tensor], budget: int) -> list[Tensor]:
    """Masks of the `budget` most important triplets; of equal ones, those that come first in the model."""
    import torch

    together = torch.cat(scores)
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[together.argsort(descending=True, stable=True)[:budget]] = True
    return list(kept.split([len(one) for one in scores]))


def _adapted(model: Any) -> Any:
    """The transformers model inside peft's two wrappers: the one whose names peft's allocator uses."""
    return model.base_model.model


def _allocator(model: Any) -> Any:
    return model.base_model.rankallocator


def _last_allocation(config: Any) -> int:
    """The step at which the final budget is allocated."""
    return int(config.total_step - config.tfinal)


def _lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = svd_layers(model).items()
    return {f"{name}.{part}.{ADAPTER}": getattr(one, part)[ADAPTER] for name, one in layers for part in PARTS}


def _averages(model: nn.Module) -> dict[str, Tensor]:
    """The running averages; zero before the first step, so that a checkpoint's size is known from the start."""
    import torch

    allocator, found = _allocator(model), {}
    for average in AVERAGES:
        held = getattr(allocator, average)
        for name, parameter in _lora_parameters(model).items():
            found[f"{average}.{name}"] = held[name] if name in held else torch.zeros_like(parameter.detach())
    return found


def _refuse_no_gradients(model: nn.Module) -> None:
    if any(parameter.grad is None for parameter in _lora_parameters(model).values()):
        raise MethodError(f"the gradients that importance is measured by are gone; {CALLS}, before they are cleared")
