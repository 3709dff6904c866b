"""The chart of the report: how many times the speed of stock each arm has."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed.arms import BASE, PEFTKIT, TUNED

SHOWN = {
    "Trainer, full fine-tuning": "#8895a1",
    BASE: "#5b7f95",
    TUNED: "#c29a17",
    "TRL SFTTrainer, tuned": "#d1603d",
    PEFTKIT.name: "#2f8f6b",
    "peftkit, bfloat16": "#3b6fb6",
    "peftkit, float32": "#9ec6b5",
}
"""Arms that the chart has, with their colours."""


def draw(found: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """One group of bars for each workload, by its title; the same figures give the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    arms = [name for name in SHOWN if any(name in one for one in found.values())]
    height = 0.8 / len(arms)
    with matplotlib.rc_context({"svg.hashsalt": "peftkit", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.22 * len(arms) * len(found)), layout="constrained")
        for place, arm in enumerate(arms):
            rows = [(row, one[arm], one[BASE]) for row, one in enumerate(found.values()) if arm in one and BASE in one]
            rates = [own["tokens_per_second"] / base["tokens_per_second"] for _, own, base in rows]
            bars = axes.barh([row + place * height for row, _, _ in rows], rates, height, label=arm, color=SHOWN[arm])
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.set_yticks([row + 0.4 - height / 2 for row in range(len(found))], list(found))
        axes.invert_yaxis()
        axes.set_xlabel(f"real tokens a second, times {BASE}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
