"""Metrics that the user names: any `evaluate` module, local or from the hub."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from peftkit.errors import UsageError
from peftkit.schema import Section


class MetricSettings(Section):
    """A metric beside the task's own: an `evaluate` module by hub name or local path."""

    name: str
    configuration: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the metric's `compute`, such as `average: macro`."""


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyMetric = Annotated[MetricSettings, BeforeValidator(_by_name, json_schema_input_type=MetricSettings | str)]


def extra_values(
    metrics: Sequence[MetricSettings | Any],
    predictions: list[Any],
    references: list[Any],
    known: Mapping[str, Any],
) -> dict[str, float]:
    """Figures of modules, named or given; a name that is taken already is prefixed with the module's.

    Raises:
        UsageError: a module cannot be loaded, or does not take these predictions.
    """
    values: dict[str, float] = {}
    for metric in metrics:
        label, options = _label_and_options(metric)
        figures = _figures(_compute(metric, label, options, predictions, references))
        if not figures:
            raise UsageError(f"metric '{label}' gives no single number, so it cannot be recorded; set its options")
        for name, value in figures.items():
            values[_free_name(name, label, {*known, *values})] = value
    return values


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in result.items()
        if isinstance(value, int | float) or getattr(value, "ndim", None) == 0
    }


def _free_name(name: str, label: str, taken: Collection[str]) -> str:
    """`name`, else `label_name`, else `label_name_2` and so on."""
    numbered = (f"{label}_{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain((name, f"{label}_{name}"), numbered) if one not in taken)


def load_metric(settings: MetricSettings) -> Any:
    """The `evaluate` module.

    Raises:
        UsageError: no such module, or the hub cannot be reached.
    """
    import evaluate

    try:
        return evaluate.load(settings.name, settings.configuration, keep_in_memory=True)
    except Exception as error:  # evaluate raises many kinds, from the hub's to the module's own imports
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"task.metrics: cannot load '{settings.name}': {first}") from error


def _label_and_options(metric: MetricSettings | Any) -> tuple[str, dict[str, Any]]:
    if isinstance(metric, MetricSettings):
        return metric.name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".py"), metric.options
    return str(getattr(metric, "name", type(metric).__name__)), {}


def _compute(
    metric: MetricSettings | Any,
    label: str,
    options: dict[str, Any],
    predictions: list[Any],
    references: list[Any],
) -> dict[str, Any]:
    module = load_metric(metric) if isinstance(metric, MetricSettings) else metric
    try:
        return dict(module.compute(predictions=predictions, references=references, **options))
    except Exception as error:  # the module is foreign code
        raise UsageError(f"metric '{label}' failed on the predictions: {error}") from error
