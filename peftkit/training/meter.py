"""What a run costs while it runs: tokens a second, time left, memory."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from peftkit.backbones.load import BEFORE
from peftkit.memory import peak_resident_bytes

if TYPE_CHECKING:
    from torch import nn

EXPECTED = "expected_memory_bytes"
"""The attribute of an attached model that holds what its training was expected to take."""
LINES = 10
"""Progress lines of a run whose output is not a terminal."""


class Meter:
    """Shows progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when `shown` is False.

    Tokens are real ones; padding is not counted. Evaluation time does not count: call `pause` and `resume`.
    """

    def __init__(self, total_steps: int, step: int = 0, tokens: int = 0, seconds: float = 0.0, shown: bool = True):
        self.tokens, self._total, self._step = tokens, total_steps, step
        self._start_step, self._start_tokens, self._start_seconds = step, tokens, seconds
        self._elapsed, self._since = seconds, time.perf_counter()
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Meter:
        if self._shown and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("training", total=self._total, completed=self._step, loss="", rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds of training alone."""
        return self._elapsed + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second of training since this process began."""
        return (self.tokens - self._start_tokens) / max(self.seconds - self._start_seconds, 1e-9)

    def pause(self) -> None:
        """Stop the clock."""
        self._elapsed, self._since = self.seconds, None  # type: ignore[assignment]

    def resume(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def step(self, tokens: int, loss: float) -> None:
        """Count one optimizer step over `tokens` real tokens."""
        self.tokens += tokens
        self._step += 1
        rate = f"{self.tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, advance=1, loss=f"loss {loss:.4f}", rate=rate)
        elif self._shown and self._step % max(1, self._total // LINES) == 0:
            done = self._step - self._start_step
            left = (self.seconds - self._start_seconds) / done * (self._total - self._step)
            print(
                f"step {self._step:,}/{self._total:,}  loss {loss:.4f}  {rate}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


def peak_memory_bytes(device_type: str = "cpu") -> int:
    """The most held since a backbone began to load: on a GPU allocated by torch, on a CPU resident in this process."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def memory_growth_bytes(model: nn.Module, device_type: str = "cpu") -> int | None:
    """What of that came with the model, its training and its evaluation; None where the model was not loaded here."""
    if device_type == "cuda":
        return peak_memory_bytes(device_type)
    before = getattr(model, BEFORE, None)
    return None if before is None else max(0, peak_resident_bytes() - before)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
