"""Methods side by side on one backbone: as asked for, as published, or as large as a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit.errors import MethodError, UsageError
from peftkit.planning.budget import fit
from peftkit.planning.parameters import Counts, count, planned_model
from peftkit.planning.specs import Spec, parse_method, parse_number, published, with_value

if TYPE_CHECKING:
    from torch import nn

    from peftkit.methods.base import Method


@dataclass(frozen=True)
class Answer:
    """One method on one backbone: its counts, or why it cannot be there."""

    label: str
    spec: str
    """In the words of the command line; with a budget, of the size that was found."""
    size: str = ""
    """Such as `rank=8`; empty for methods of one size."""
    counts: Counts | None = None
    note: str = ""
    """Why there are no counts, or why they are no nearer to the budget."""
    budget: int | None = None

    @property
    def trainable(self) -> int:
        """All that trains; none where the method cannot be."""
        return self.counts.trainable_parameters if self.counts else 0

    @property
    def deviation_percent(self) -> float | None:
        """How far what trains without the head is from the budget."""
        if self.counts is None or not self.budget:
            return None
        trained = self.counts.trainable_parameters - self.counts.head_parameters
        return 100 * (trained - self.budget) / self.budget

    def as_dict(self) -> dict[str, Any]:
        """One flat row; figures are None where there are none."""
        names = [*(name for name in Counts.__dataclass_fields__ if name != "method"), "trainable_percent"]
        figures = self.counts.as_dict() if self.counts else {}
        row = {"method": self.spec, "label": self.label} | {name: figures.get(name) for name in names}
        if self.budget:
            row |= {"budget": self.budget, "deviation_percent": self.deviation_percent}
        return row | {"note": self.note}


def survey(
    backbone: str, specs: Sequence[str] | None, task: str | None, labels: int, budget: str | None = None
) -> list[Answer]:
    """Methods on one backbone, from its configuration alone.

    Args:
        specs: what somebody asks for, answered in that order; None for every published method, sorted by what it trains
            and with those that cannot be on this backbone last.
        budget: parameters to come close to, such as `0.3M`.

    Raises:
        UsageError: a spec or number that cannot be read, or a method that was asked for and cannot be on this backbone.
    """
    limit = _read_budget(budget)
    chosen = published() if specs is None else [Spec(text, text) for text in specs]
    methods = [parse_method(spec.text) for spec in chosen]
    if limit and specs:
        _refuse_sizes(specs, methods)
    model = planned_model(backbone, task, labels)
    answers = [_answer(spec, method, model, limit) for spec, method in zip(chosen, methods, strict=True)]
    if specs is None:
        # sizes that differ as published are the same once a budget sets them
        answers = list({(answer.label, answer.spec): answer for answer in answers}.values())
        return sorted(answers, key=lambda answer: (answer.counts is None, answer.trainable))
    if refused := next((answer for answer in answers if answer.counts is None), None):
        raise UsageError(f"--method {refused.label}: {refused.note}")
    return answers


def _answer(spec: Spec, method: Method, model: nn.Module, budget: int | None) -> Answer:
    answer = Answer(spec.label, spec.text, budget=budget)
    try:
        if budget:
            found = fit(method, model, budget)
            method, answer = found.method, replace(answer, note=found.note)
        size, text = "", spec.text
        if method.size is not None and (value := getattr(method, method.size)) is not None:
            size = f"{method.size}={value}"
            text = with_value(text, method.size, value) if budget else text
        return replace(answer, size=size, spec=text, counts=count(text, method, model))
    except MethodError as error:
        return replace(answer, note=str(error))


def _read_budget(text: str | None) -> int | None:
    if text is None:
        return None
    if not (number := parse_number(text)):
        raise UsageError(f"--budget: '{text}' is not a number of parameters such as 300000, 300k or 0.3M")
    return number


def _refuse_sizes(specs: Sequence[str], methods: Sequence[Method]) -> None:
    for spec, method in zip(specs, methods, strict=True):
        if method.size in method.model_fields_set:
            raise UsageError(f"--method {spec}: --budget finds '{method.size}'; leave it out")
