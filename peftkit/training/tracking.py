"""Where figures go while a run trains: log.jsonl, Accelerate's trackers, the learning-curve picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.disk import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftkit.training.checkpoint import Progress

LOG = "log.jsonl"
CURVE = "learning_curve.png"


class Log:
    """One JSON line an event, in the run folder, and the same figures to the trackers. Main process only."""

    def __init__(self, folder: Path, accelerator: Accelerator, from_step: int = 0) -> None:
        self._accelerator = accelerator
        self._file = folder / LOG if accelerator.is_main_process else None
        if self._file:
            _drop_after(self._file, from_step)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append one event."""
        if self._file:
            with self._file.open("a") as stream:
                stream.write(json.dumps({"step": step} | figures) + "\n")
        numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        self._accelerator.log(numbers, step=step)


def learning_curve(progress: Progress, headline: str, folder: Path) -> None:
    """Draw training loss and the dev headline over steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(progress.losses) + 1)
    left.plot(steps, progress.losses, color="0.8", linewidth=0.7)
    left.plot(steps, _smoothed(progress.losses), color="C0", label="training loss")
    left.set(xlabel="optimizer step", ylabel="training loss")
    right = left.twinx()
    right.plot(
        [one["step"] for one in progress.evaluations],
        [one[f"dev_{headline}"] for one in progress.evaluations],
        "o-",
        color="C1",
        label=f"dev {headline}",
    )
    right.set(ylabel=f"dev {headline}")
    figure.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.0), bbox_transform=left.transAxes)
    figure.savefig(folder / CURVE, dpi=120)
    pyplot.close(figure)


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def _drop_after(file: Path, step: int) -> None:
    """Forget events later than the checkpoint that the run continues from."""
    lines = file.read_text().splitlines() if file.exists() else []
    write_text(file, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """The step of an event; a line that a killed run left half-written belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return float("inf")
