"""A graph in ONNX Runtime beside the model that it was made of: its outputs, and what a task makes of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.export import Exportable
from peftkit.errors import DataError, UsageError
from peftkit.evaluation import evaluate, predict
from peftkit.prepare import Split, encode_split
from peftkit.session import inference_accelerator

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = {
    "AutoModelForSequenceClassification": ("logits",),
    "AutoModelForTokenClassification": ("logits",),
    "AutoModelForQuestionAnswering": ("start_logits", "end_logits"),
}
"""By the class of the model: what is exported, and what its graph returns."""
Batch = dict[str, Any]


@dataclass(frozen=True)
class OnnxFigures:
    """One graph beside torch."""

    bytes: int
    largest_difference: float
    """Largest |Δlogit| over real tokens."""
    largest_logit: float
    equal: int
    """Rows whose prediction is the same; of texts without a run, those whose largest logits are."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the task on the same rows, where they have labels."""

    @property
    def relative(self) -> float:
        """Largest |Δlogit| over max(1, largest |logit|)."""
        return self.largest_difference / max(1.0, self.largest_logit)


def session_of(file: Path) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def computed_by(session: Any, model: nn.Module) -> Iterator[None]:
    """Within it, `model` is a shell: its outputs are those of the graph, so that a task predicts and scores with it."""
    import torch

    names = [one.name for one in session.get_outputs()]
    takes = {one.name for one in session.get_inputs()}

    def forward(**inputs: Any) -> SimpleNamespace:
        given = {name: inputs[name].cpu().numpy() for name in inputs if name in takes}
        found = [torch.from_numpy(one).to(inputs["input_ids"].device) for one in session.run(names, given)]
        return SimpleNamespace(**dict(zip(names, found, strict=True)))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def predicted(found: Exportable, split: Split | None) -> tuple[list[Any], dict[str, float]]:
    """What a run's task makes of the model's outputs, and its scores where the rows have labels."""
    if split is None or found.saved is None:
        return [], {}
    run = found.saved.run
    accelerator = inference_accelerator(run)
    predictions = predict(found.model, run.task, split, accelerator)
    try:
        scored = encode_split(run, split.name, split.rows, found.saved.head, found.saved.tokenizer)
        scores = evaluate(found.model, run.task, scored, accelerator).scores.values
    except (DataError, UsageError):  # texts alone have no labels
        scores = {}
    found.model.cpu()
    return predictions, scores


def figures(
    found: Exportable, split: Split | None, batches: Sequence[Batch], before: Sequence[Any], file: Path
) -> OnnxFigures:
    """One graph beside the model, whose predictions were `before`."""
    import torch

    session = session_of(file)
    names = OUTPUTS[found.head.model_class]
    by_token = found.head.model_class != "AutoModelForSequenceClassification"
    difference, largest, alike = 0.0, 0.0, 0
    for batch in batches:
        with torch.no_grad():
            expected = found.model(**batch)
        given = {key: value.numpy() for key, value in batch.items()}
        outputs = dict(zip(names, map(torch.from_numpy, session.run(list(names), given)), strict=True))
        for row, real in enumerate(batch["attention_mask"].bool()):
            kept = real if by_token else slice(None)
            pairs = [(getattr(expected, name)[row][kept], outputs[name][row][kept]) for name in names]
            off = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
            difference = off if math.isnan(off) else max(difference, off)
            largest = max(largest, *(float(one.abs().max()) for one, _ in pairs))
            alike += all(bool((one.argmax(-1) == other.argmax(-1)).all()) for one, other in pairs)
    if split is None:
        return OnnxFigures(file.stat().st_size, difference, largest, alike)
    with computed_by(session, found.model):
        after, scores = predicted(found, split)
    return OnnxFigures(file.stat().st_size, difference, largest, sum(map(_alike, before, after)), scores)


def _alike(one: Any, other: Any) -> bool:
    """Whether two predictions give the same answer, whatever their probabilities; of numbers, to three digits."""
    answers = [key for key in ("label", "labels", "tags", "answer") if key in one]
    if answers:
        return all(one[key] == other[key] for key in answers)
    return all(math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-3) for key in one)
