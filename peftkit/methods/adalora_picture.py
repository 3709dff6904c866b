"""How AdaLoRA's ranks fell during a run, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.methods.adalora_allocation import Reallocation

TRAJECTORY = "rank_trajectory.png"
MOST_LABELS = 40


def draw_trajectory(
    history: Sequence[Reallocation], names: Sequence[str], budget: Callable[[int], int], steps: int, file: Path
) -> None:
    """Total rank beside the budget, and below it the rank of each matrix, over `steps` optimizer steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    height = 4 + 0.16 * min(len(names), MOST_LABELS)
    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(9, height), layout="constrained", height_ratios=(3, height - 3)
    )
    _draw_total(above, history, budget, steps)
    colours = _draw_ranks(below, history, names, steps)
    figure.colorbar(colours, ax=below, label="rank")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_total(axes: Any, history: Sequence[Reallocation], budget: Callable[[int], int], steps: int) -> None:
    edges = [one.step for one in history] + [steps]
    totals = [sum(one.ranks) for one in history]
    axes.stairs(totals, edges, baseline=None, color="C0", linewidth=1.5, label="total rank")
    axes.plot(range(steps + 1), [budget(step) for step in range(steps + 1)], "--", color="C1", label="budget")
    axes.set(ylabel="total rank", ylim=(0, None), title=f"total rank {totals[0]} → {totals[-1]}")
    axes.legend()


def _draw_ranks(axes: Any, history: Sequence[Reallocation], names: Sequence[str], steps: int) -> Any:
    columns = list(zip(*(one.ranks for one in history), strict=True))
    edges = [one.step for one in history] + [steps]
    largest = max(map(max, columns))
    colours = axes.pcolormesh(edges, range(len(names) + 1), columns, vmin=0, vmax=largest, cmap="viridis")
    shown = range(0, len(names), -(-len(names) // MOST_LABELS))
    axes.set_yticks([row + 0.5 for row in shown], [names[row] for row in shown], fontsize=6)
    axes.set(xlabel="optimizer step")
    axes.invert_yaxis()
    return colours
