"""From a batch of examples, of whichever adapters, to predictions by the code of their tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.inference import in_precision, refuse_nan
from peftkit.data.collate import collate
from peftkit.errors import UsageError
from peftkit.serving.batching import Unit
from peftkit.serving.mixing import READING, Share
from peftkit.serving.resident import Adapter, Resident
from peftkit.serving.writing import Listened
from peftkit.tasks.base import Task
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.seq2seq import BEGINS

if TYPE_CHECKING:
    import torch

Told = Callable[[int, int, int], None]
"""Hears of a batch: its examples, its tokens with padding, its adapters."""


def lane_of(adapter: Adapter, task: Task, example: dict[str, Any]) -> Hashable:
    """What examples must have in common to be in one batch."""
    generation = getattr(task, "generation", None)
    if generation is not None and generation.do_sample:
        return ("drawn", object())  # what is drawn depends on the whole batch
    precision = adapter.saved.run.training.precision
    if isinstance(task, LanguageModel):
        begins = sorted(example.get(BEGINS, {}).items())
        settings = (str(generation), str(example.get("ends")), str(begins), "prompt" in example)
        return ("written", id(adapter) if adapter.alone else None, precision, type(task).__name__, settings)
    return ("read", id(adapter) if adapter.alone else None, precision)


class Computer:
    """The model's side of the queue."""

    def __init__(self, resident: Resident, told: Told) -> None:
        self.resident, self.told = resident, told

    def __call__(self, batch: list[Unit]) -> None:
        """Compute a batch of one lane, and hand each prediction to its job."""
        import torch

        groups: dict[Adapter, list[Unit]] = {}
        for unit in batch:
            groups.setdefault(unit.job.adapter, []).append(unit)
        ordered = [unit for units in groups.values() for unit in units]
        self.told(len(ordered), len(ordered) * max(unit.length for unit in ordered), len(groups))
        one = next(iter(groups))
        with torch.no_grad(), in_precision(one.saved.run, self.resident.device):
            if isinstance(ordered[0].job.task, LanguageModel):
                self._write(ordered, groups)
            elif one.alone:
                self._hand_out(one, ordered, one.saved.model)
            else:
                self._read(ordered, groups)

    def _read(self, ordered: list[Unit], groups: dict[Adapter, list[Unit]]) -> None:
        """One pass through the blocks for everybody, then each adapter's own head over its rows."""
        mixer, shares = self.resident.mixer, _shares(groups)
        assert all(adapter.saved.head.model_class in READING for adapter in groups)
        found = mixer.read(shares, [unit.example for unit in ordered], _pad_id(ordered))
        for share, (adapter, units) in zip(shares, groups.items(), strict=True):
            width = max(unit.length for unit in units)
            with mixer.in_place(adapter.saved.model, found, share, width):
                self._hand_out(adapter, units, adapter.saved.model)

    def _write(self, ordered: list[Unit], groups: dict[Adapter, list[Unit]]) -> None:
        """The resident model for everybody, or an adapter's own, generating for all rows at once."""
        one = next(iter(groups))
        writer = Listened(one.saved.model if one.alone else self.resident.model, ordered)
        if one.alone:
            self._hand_out(one, ordered, writer)
            return
        with self.resident.mixer.sharing(_shares(groups)):
            self._hand_out(one, ordered, writer)

    def _hand_out(self, adapter: Adapter, units: Sequence[Unit], model: Any) -> None:
        task = units[0].job.task
        batch = collate([unit.example for unit in units], _pad_id(units), self.resident.device)
        predictions = task.predict(model, batch, adapter.saved.head.labels)
        refuse_nan(predictions, adapter.folder)
        for unit, prediction in zip(units, predictions, strict=True):
            unit.job.take(unit.index, prediction)


def _shares(groups: dict[Adapter, list[Unit]]) -> list[Share]:
    shares: list[Share] = []
    for adapter, units in groups.items():
        first = shares[-1].end if shares else 0
        shares.append(Share(adapter.layers, first, first + len(units)))
    return shares


def _pad_id(units: Sequence[Unit]) -> int:
    return int(units[0].job.adapter.saved.tokenizer.pad_token_id or 0)


def device_named(name: str) -> torch.device:
    """The device that `--device` asks for.

    Raises:
        UsageError: a GPU where torch sees none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here (`peftkit env`); leave it out, or give --device cpu")

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
