"""What a merged model must be, and how far what was read back is from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.probe import Answers
from peftkit.backbones.load import Head
from peftkit.errors import ArtifactError
from peftkit.tasks.base import Task
from peftkit.tasks.outputs import divergences

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOLD = 3
"""Faults that an error names."""
PASSING = frozenset({"transformers_version", "dtype", "architectures", "_name_or_path", "quantization_config"})
"""Of a configuration, what says nothing about what is computed; the dtype is compared by itself."""


@dataclass(frozen=True)
class Expected:
    """What plain transformers has to find in the folder, taken from the run and from the model before it was saved."""

    config: dict[str, Any]
    generation: dict[str, Any] | None
    vocabulary: dict[str, int]
    special: dict[str, str]
    chat_template: Any
    labels: tuple[str, ...]
    dtype: str
    model_class: str
    tied: bool
    tensors: dict[str, str]
    """Hashes by name, of what was computed, cast once, or packed."""


@dataclass(frozen=True)
class Figures:
    """How far two models are apart on the same examples."""

    rows: int
    """Compared: the first ones, as many as keep the logits that are held at once in bounds."""
    equal_predictions: int
    """Of these; a row of a language model only if each of its tokens is."""
    argmax_agreement: float | None
    """Share of items (texts, tokens, marks) for which both choose the same; None of numbers."""
    largest_difference: float
    """Largest |Δlogit|."""
    largest_logit: float
    mean_divergence: float
    """½ (KL(p ‖ q) + KL(q ‖ p)) in nats, over classes or tokens; mean square of the difference where outputs are
    numbers."""
    largest_divergence: float

    @property
    def relative(self) -> float:
        """Largest |Δlogit| over max(1, largest |logit|)."""
        return self.largest_difference / max(1.0, self.largest_logit)


@dataclass(frozen=True)
class MergeReport(Figures):
    """How far the merged model, read back from disk by another process, is from the run it came from."""

    examples: int = 0
    """Given to compare on; windows count one by one."""
    tolerance: float = 0.0
    """Largest `relative` that is let through."""
    arithmetic: float = 0.0
    """`relative` of the merge itself: W + ΔW before it is cast, beside W and ΔW apart, on the first batch."""
    model_class: str = ""
    pooling: str = "none"
    score: dict[str, Any] | None = None
    """Headline figure over the whole probe `before` and `after`; None where its rows have no labels."""
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    """Of a streamed merge: how many were adapted, and compared one by one."""
    layer_difference: float = 0.0
    """The largest of them, relative to the largest output of the layer."""
    bytes: int = 0
    """Of the weight files that were written."""
    whole_bytes: int = 0
    """Of all weights of the run's merged model in the same dtype, when none is packed or left out."""

    def as_dict(self) -> dict[str, Any]:
        """What is written beside the merged model."""
        return {**vars(self), "relative": self.relative}


def expected_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, head: Head, dtype: str, tied: bool, tensors: dict[str, str]
) -> Expected:
    """What must be found of a merged model, by the model that holds its configuration.

    Args:
        tensors: digests of its weights by name; none where they are compared otherwise.
    """
    return Expected(
        config=model.config.to_dict(),
        generation=model.generation_config.to_dict() if model.can_generate() else None,
        vocabulary=dict(tokenizer.get_vocab()),
        special={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        chat_template=head.chat_template or tokenizer.chat_template,
        labels=labels_of(head),
        dtype=dtype,
        model_class=type(model).__name__,
        tied=tied,
        tensors=tensors,
    )


def labels_of(head: Head) -> tuple[str, ...]:
    """The labels that the configuration has to name; none where the outputs are other things, as in extracting."""
    return head.labels if head.outputs in (None, len(head.labels)) else ()


def refuse_other(expected: Expected, found: Mapping[str, Any], weights: bool = True) -> None:
    """Refuse a folder in which transformers finds something else than was to be written.

    Args:
        weights: they were read, too.

    Raises:
        ArtifactError: names the first faults.
    """
    faults = [*_faults_beside_weights(expected, found), *(_faults_of_weights(expected, found) if weights else ())]
    if faults:
        more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        raise ArtifactError(
            f"the merged model is not the one that was evaluated: {'; '.join(faults[:TOLD])}{more}; nothing was written"
        )


def _faults_beside_weights(expected: Expected, found: Mapping[str, Any]) -> Iterator[str]:
    if found["imported"]:
        yield f"the process that read it was not plain transformers: it imported {found['imported'][0]}"
    yield from _stale(found["files"])
    for name, theirs in _differing(expected.config, found["config"]):
        yield f"its config.json says {name} {theirs}"
    if expected.labels and [*found["config"]["id2label"].values()] != list(expected.labels):
        yield f"its labels are {', '.join([*found['config']['id2label'].values()][:8])}"
    if found["dtype"] != expected.dtype:
        yield f"its config.json says {found['dtype']}, not {expected.dtype}"
    if expected.generation is not None and "generation" not in found:
        yield "generation_config.json is missing"
    elif expected.generation is not None:
        for name, theirs in _differing(expected.generation, found["generation"]):
            yield f"its generation_config.json says {name} {theirs}"
    if odd := sorted(expected.vocabulary.items() ^ found["vocabulary"].items()):
        yield f"its tokenizer differs in {len({name for name, _ in odd})} tokens, such as '{odd[0][0]}'"
    if expected.special != found["special"]:
        yield f"its tokenizer has other special tokens: {found['special']}"
    if expected.chat_template != found["chat_template"]:
        yield "its chat template is another"


def _faults_of_weights(expected: Expected, found: Mapping[str, Any]) -> Iterator[str]:
    if found["class"] != expected.model_class:
        yield f"it loads as {found['class']}, not as {expected.model_class}"
    for what, names in found["amiss"].items():
        if names:
            yield f"{what.replace('_keys', ' weights')}: {', '.join(names[:TOLD])}"
    if found["tied"] != expected.tied:
        yield "the output and the word embeddings " + ("share a matrix" if found["tied"] else "share no matrix")
    if not expected.tensors:
        return
    if odd := sorted(expected.tensors.items() ^ found["tensors"].items()):
        names = list(dict.fromkeys(name for name, _ in odd))
        yield f"{len(names)} weights are not W + ΔW, cast once or packed, such as '{names[0]}'"


def _stale(files: list[str]) -> Iterator[str]:
    """Weight files that belong to nothing: readers take now these and now those."""
    whole = [name for name in files if name.endswith(".safetensors")]
    sharded = "model.safetensors.index.json" in files
    odd = [name for name in whole if (name == "model.safetensors") == sharded or not name.startswith("model")]
    odd += [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")) or name.startswith("adapter_")]
    if not whole:
        yield "it has no weights"
    for name in odd:
        yield f"{name} does not belong there"


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of settings with other values, and what they are in the folder."""
    mine = json.loads(json.dumps(ours, default=str))
    for name in sorted((mine.keys() | theirs.keys()) - PASSING):
        if mine.get(name) != theirs.get(name):
            text = repr(theirs.get(name))
            yield name, text if len(text) <= 60 else f"{text[:59]}…"


def figures(task: Task, before: list[Tensor], after: list[Tensor]) -> dict[str, Any]:
    """The fields of `Figures`.

    Raises:
        ArtifactError: there is nothing to compare on.
    """
    pairs = [(one.double(), two.double()) for one, two in zip(before, after, strict=True) if one.numel()]
    if not pairs:
        raise ArtifactError("nothing to compare the merged model on: no row has a supervised token; give others")
    differences = [float((one - two).abs().max()) for one, two in pairs]
    apart = [float(value) for one, two in pairs for value in divergences(task.outputs, one, two).flatten()]
    return {
        "rows": len(pairs),
        "argmax_agreement": _agreement(task, pairs),
        "equal_predictions": sum(task.answers_alike(one, two) for one, two in pairs),
        "largest_difference": math.nan if any(map(math.isnan, differences)) else max(differences),
        "largest_logit": max(float(one.abs().max()) for one, _ in pairs),
        "mean_divergence": math.fsum(apart) / len(apart),
        "largest_divergence": max(apart),
    }


def _agreement(task: Task, pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    if task.outputs == "number":
        return None
    chosen = [(one > 0, two > 0) if task.outputs == "marks" else (one.argmax(-1), two.argmax(-1)) for one, two in pairs]
    return sum(int((one == two).sum()) for one, two in chosen) / sum(one.numel() for one, _ in chosen)


def refuse_far(relative: float, difference: float, allowed: float, what: str = "the merged model") -> None:
    """Refuse a difference of logits above the tolerance.

    Raises:
        ArtifactError: says how large it is.
    """
    # written so that a difference that is not a number is refused too
    if not relative <= allowed:
        raise ArtifactError(
            f"{what} is not the one that was evaluated: logits differ by {difference:.2g} ({relative:.2g} relative, "
            f"{allowed:g} allowed); nothing was written"
        )


def relative_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest |Δ| over max(1, largest |·|)."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    found = [float((a - b).abs().max()) for a, b in pairs]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0) / max(1.0, largest)


def scores(before: Answers, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """The headline figure of both, and the others."""
    if before.score is None or after is None:
        return None
    return {
        "name": before.score["name"],
        "before": before.score["value"],
        "after": after["value"],
        "all": {"before": before.score["values"], "after": after["values"]},
    }
