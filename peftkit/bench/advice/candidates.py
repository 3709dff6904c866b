"""Which methods are tried for a configuration, and with which learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftkit.config import Run
from peftkit.errors import MethodError, UsageError
from peftkit.methods.base import Method
from peftkit.planning.specs import parse_method
from peftkit.planning.usual_rates import rates_to_try
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from peftkit.prepare import Prepared

KNOWN = {
    "full": "full",
    "head": "head",
    "lora": "lora:rank=8,alpha=16,targets=all",
    "adalora": "adalora:target_rank=8,targets=all",
    "pfeiffer": "bottleneck:placement=pfeiffer",
    "prefix": "prefix:length=20",
    "bitfit": "bitfit",
    "dora": "lora:rank=8,alpha=16,targets=all,variant=dora",
    "houlsby": "bottleneck:placement=houlsby,train_layernorm=true",
    "parallel": "bottleneck:placement=parallel",
    "ia3": "ia3",
    "vera": "vera:rank=256,targets=all",
    "layernorm": "layernorm",
    "top_layers": "top_layers:layers=2",
    "prompt": "prompt:length=20",
    "p_tuning": "p_tuning",
}
"""Name → settings, in the words of `peftkit params --method`."""
USUAL = ("full", "head", "lora", "adalora", "pfeiffer", "prefix", "bitfit")
"""Those that are tried unless others are named; the configuration's own always is."""
DISTINGUISHING = ("placement", "variant")
"""Settings by which methods of one kind have names of their own."""


@dataclass(frozen=True)
class Candidate:
    """A method that can be tried."""

    name: str
    method: Method
    rates: tuple[float, ...]
    """In the order of trial."""
    least_steps: int = 1
    """It can be trained for."""


@dataclass(frozen=True)
class Candidates:
    """What is tried, and what is not."""

    chosen: Mapping[str, Candidate]
    own: str
    """The name of the configuration's own method, which may not be among them."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name → why."""


def names(run: Run, asked: Sequence[str]) -> tuple[str, ...]:
    """The methods to look at for a run.

    Args:
        asked: only these; none for the usual ones and the run's own.

    Raises:
        UsageError: no such method.
    """
    own = name_of(run.method)
    known = dict.fromkeys([*KNOWN, own])
    for name in asked:
        if name not in known:
            raise UsageError(f"--method: no method '{name}'{did_you_mean(name, known)}")
    return tuple(dict.fromkeys(asked or [*USUAL, own]))


def name_of(method: Method) -> str:
    """What a method is called here: its kind, or a name of its own within that."""
    for name, spec in KNOWN.items():
        known = parse_method(spec)
        same = all(getattr(known, one, None) == getattr(method, one, None) for one in DISTINGUISHING)
        if known.kind == method.kind and same:
            return name
    return method.kind


def candidates(run: Run, data: Prepared, wanted: Sequence[str], steps: int) -> Candidates:
    """Those of the wanted methods that the task, the backbone and the length of training allow.

    The configuration's own method keeps its settings, and its learning rate is the first to be tried.

    Args:
        steps: of the configuration's training.

    Raises:
        UsageError: fewer than two are left, so there is nothing to compare.
    """
    own = name_of(run.method)
    chosen: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for name in wanted:
        method = run.method if name == own else parse_method(KNOWN[name])
        rate = run.training.learning_rate if name == own else None
        reason = _obstacle(run, data, method, steps)
        if reason:
            left_out[name] = reason
        else:
            least = next(count for count in range(1, steps + 1) if _trainable_for(method, count) is None)
            chosen[name] = Candidate(name, method, rates_to_try(method.kind, rate), least)
    if len(chosen) < 2:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UsageError(f"{len(chosen)} method can be tried, and a comparison takes two{told and f' ({told})'}")
    return Candidates(chosen, own, left_out)


def _obstacle(run: Run, data: Prepared, method: Method, steps: int) -> str | None:
    """Why a run cannot have a method; None where it can."""
    from peftkit.prepare import check_method

    conflicts = method.conflicts(
        task=run.task,
        dtype=run.backbone.dtype,
        quantization=run.backbone.quantization,
        checkpointing=run.training.gradient_checkpointing,
    )
    if conflicts:
        return "; ".join(conflicts)
    try:
        check_method(run.model_copy(update={"method": method}), data.head, data.tokenizer)
    except UsageError as error:
        return str(error).removeprefix("method: ")
    if method.kind == "head" and not _has_head(run, data):
        return "the task puts no head on this backbone"
    return _trainable_for(method, steps)


def _has_head(run: Run, data: Prepared) -> bool:
    from peftkit.backbones.load import chosen_config, meta_model, resolve_config
    from peftkit.backbones.modules import head_modules

    return bool(head_modules(meta_model(chosen_config(run.backbone, resolve_config(run.backbone)), data.head)))


def _trainable_for(method: Method, steps: int) -> str | None:
    """Why a training of so many steps is too short for a method; None where it is not."""
    try:
        method.check_steps(steps)
    except MethodError as error:
        return str(error)
    return None
