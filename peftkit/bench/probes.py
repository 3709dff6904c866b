"""What a grid may ask of what a backbone could do before it was tuned. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from peftkit.data.mix import AnyData
from peftkit.schema import Section
from peftkit.tasks import AnyTask, PlainText, Seq2Seq
from peftkit.tasks.prompted import Prompted

Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w.()+ -]+$")]


class FeatureProbe(Section):
    """What an encoder forgets: a linear classifier of texts on its mean features, fitted before it is tuned."""

    kind: Literal["features"] = "features"
    name: Name
    data: AnyData
    text: str = "text"
    label: str = "label"
    rows: Annotated[int, Field(gt=0)] = 800
    """Of train to fit on, and of test to score, spread over each."""
    max_length: Annotated[int, Field(gt=2)] = 64


class LanguageModelProbe(Section):
    """What a decoder forgets: its loss on general text, in nats a token, before and after it is tuned.

    The text is joined, cut into blocks of equal length, and read by the tuned model as it is deployed: with its
    adapter, prefix or virtual tokens, and without any prompt.
    """

    kind: Literal["language_model"] = "language_model"
    name: Name
    data: AnyData
    """Its test rows are read; where it names none, those of dev."""
    text: str = "text"
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """Text behind every row; wikitext's rows are the lines of one text."""
    blocks: Annotated[int, Field(gt=0)] = 64
    """So many at even distances, of all."""
    max_length: Annotated[int, Field(gt=2)] = 256
    """Tokens of a block."""


Probe: TypeAlias = FeatureProbe | LanguageModelProbe
AnyProbe = Annotated[Probe, Field(discriminator="kind")]
Probes = Annotated[
    Annotated[AnyProbe, Tag("(one)")] | Annotated[tuple[AnyProbe, ...], Tag("(several)")],
    Discriminator(lambda value: "(several)" if isinstance(value, list | tuple) else "(one)"),
]


def with_kinds(written: Any) -> Any:
    """What a file says of probes, features where it names no kind."""
    if isinstance(written, list):
        return [with_kinds(one) for one in written]
    return {"kind": "features"} | written if isinstance(written, dict) else written


def listed(probes: Probe | tuple[Probe, ...] | None) -> tuple[Probe, ...]:
    """All of them."""
    return probes if isinstance(probes, tuple) else () if probes is None else (probes,)


def probe_of(probes: Probe | tuple[Probe, ...] | None, task: AnyTask) -> Probe | None:
    """The first that fits the model of a task."""
    return next((one for one in listed(probes) if fits(one, task)), None)


def fits(probe: Probe, task: AnyTask) -> bool:
    """Whether the model of a task has what is probed: any but an encoder-decoder has features of a text, and a causal
    language model has a loss on it."""
    if probe.kind == "language_model":
        return writes(task)
    return not isinstance(task, Seq2Seq)


def writes(task: AnyTask) -> bool:
    """Whether a task's model is a causal language model."""
    return isinstance(task, Prompted) or (isinstance(task, PlainText) and task.objective == "causal")


def misfit(probes: Sequence[Probe], task: AnyTask) -> str:
    """Why none of them fits a task, and what would."""
    names = ", ".join(one.name for one in probes)
    if isinstance(task, Seq2Seq):
        return f"probe '{names}' does not fit an encoder-decoder, and none does; leave probe out, or this data set"
    return (
        f"probe '{names}' is of a language model's loss, and a model of task '{task.kind}' writes no text; list one of "
        "kind: features beside it"
    )
