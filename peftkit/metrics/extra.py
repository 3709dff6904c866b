"""Metrics that the user names: any `evaluate` module, local or from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


AnyMetric = Annotated[MetricSettings, BeforeValidator(_by_name)]


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
        for name, value in _compute(metric, label, options, predictions, references).items():
            if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
                taken = name in known or name in values
                values[f"{label}_{name}" if taken else name] = float(value)
    return values


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
    return str(metric.name), {}


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
