"""What tasks share whose input is a prompt: solved examples may stand in front of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from peftkit.data.files import Rows
from peftkit.tasks.base import Task


class Prompted(Task, ABC):
    """A task that a language model can be given without training, by prompting alone."""

    demonstrations: tuple[dict[str, Any], ...] = ()
    """Rows shown with their answers in front of every input, in training too. `kind: prompting` with `shots`
    chooses them from train; the configuration in the run folder holds them."""

    @abstractmethod
    def demonstration_columns(self) -> tuple[str, ...]:
        """What of a row its demonstration is made from."""

    def demonstration_rows(self) -> Rows:
        """The demonstrations as rows."""
        shown = list(self.demonstrations)
        return Rows("task.demonstrations", shown, range(1, len(shown) + 1), by_line=False)
