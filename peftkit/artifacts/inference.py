"""A finished run, or a bundle of one, as something to ask. Needs nothing that trains."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import SavedRun, load_run
from peftkit.config import Run
from peftkit.data.collate import collate
from peftkit.data.rows import Rows
from peftkit.errors import ArtifactError
from peftkit.prepare import encode_split
from peftkit.tasks.base import Prediction

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Predictor:
    """A trained model, its tokenizer and its task."""

    saved: SavedRun

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What `peftkit predict` shows of each text, or of each text and its second one."""
        return self.rows(self.saved.run.task.rows_from_text(texts, pairs))

    def rows(self, rows: Rows) -> list[dict[str, Any]]:
        """The same of rows with the columns of the task."""
        import torch

        saved, task = self.saved, self.saved.run.task
        split = encode_split(saved.run, rows.source, rows, saved.head, saved.tokenizer, supervised=False)
        examples, order = split.encoded.examples, task.order(split.encoded)
        found: dict[int, Prediction] = {}
        device = next(saved.model.parameters()).device
        with torch.no_grad(), in_precision(saved.run, device):
            for start in range(0, len(order), split.batch_size):
                chosen = order[start : start + split.batch_size]
                batch = collate([examples[index] for index in chosen], split.pad_id, device)
                found |= zip(chosen, task.predict(saved.model, batch, split.labels), strict=True)
        predictions = [found[index] for index in range(len(examples))]
        refuse_nan(predictions, saved.folder)
        joined = task.join(predictions, split.encoded, rows, saved.tokenizer)
        return [task.describe(one, record) for one, record in zip(joined, rows.records, strict=True)]


def load_predictor(folder: str | Path) -> Predictor:
    """A finished run, or what `peftkit bundle` wrote, ready to be asked.

    Raises:
        UsageError: `folder` is neither.
        ArtifactError: files changed since they were written, or the backbone's weights are others.
    """
    return Predictor(load_run(folder))


@contextlib.contextmanager
def in_precision(run: Run, device: torch.device) -> Iterator[None]:
    """Compute as the run's evaluation did: in the precision that it was trained in, or float32 where a CPU has no
    float16."""
    import torch

    dtypes = {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if device.type == "cuda" else {})
    dtype = dtypes.get(run.training.precision)
    with torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext():
        yield


def refuse_nan(predictions: Sequence[Prediction], folder: Path) -> None:
    """A model that computes no numbers still has an argmax, and would give an answer.

    Raises:
        ArtifactError: a prediction holds NaN or infinity.
    """
    try:
        json.dumps(list(predictions), allow_nan=False)
    except ValueError:
        raise ArtifactError(
            f"the model of {folder} computes something that is no number; its weights hold NaN or infinity: restore "
            "the backbone, or train again"
        ) from None
