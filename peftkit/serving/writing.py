"""A model that tells what it writes while it writes, and stops writing for those who have gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.serving.batching import Unit

if TYPE_CHECKING:
    from torch import Tensor


class Listened:
    """A model as the tasks see it, whose `generate` reports to the jobs of a batch.

    Args:
        units: one for each prompt, in order.
    """

    def __init__(self, model: Any, units: Sequence[Unit]) -> None:
        self._model, self._units = model, units

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._model(*given, **named)

    def generate(self, **given: Any) -> Any:
        """What the model generates; each new token is told to those who listen, where there are no beams."""
        config = given["generation_config"]
        if config.num_beams == 1 and any(unit.job.heard for unit in self._units):
            given["streamer"] = _Telling(self._units, config.eos_token_id or ())
        return self._model.generate(**given, stopping_criteria=[_Gone(self._units)])


class _Telling:
    """transformers' side of a stream: `put` is called with the prompts, and then with one token a row."""

    def __init__(self, units: Sequence[Unit], ends: Sequence[int]) -> None:
        self.units, self.ends = units, set(ends)
        self.tokens: list[list[int]] = [[] for _ in units]
        self.writing = [True for _ in units]
        self.is_first = True

    def put(self, value: Tensor) -> None:
        if self.is_first:
            self.is_first = False
            return
        for row, (unit, token) in enumerate(zip(self.units, value.tolist(), strict=True)):
            if not self.writing[row] or token in self.ends:
                self.writing[row] = False
                continue
            self.tokens[row].append(token)
            if unit.job.heard and not unit.job.abandoned:
                unit.job.heard(unit.index, self.tokens[row])

    def end(self) -> None:
        return


class _Gone:
    """Rows whose job nobody waits for are done."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units

    def __call__(self, input_ids: Tensor, scores: Any, **named: Any) -> Tensor:
        import torch

        gone = [unit.job.abandoned for unit in self.units]
        beams = input_ids.shape[0] // len(gone)
        return torch.tensor(gone, device=input_ids.device).repeat_interleave(beams)
