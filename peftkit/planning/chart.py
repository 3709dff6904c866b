"""A picture of what methods train on one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.disk import require_writable, whole_file
from peftkit.errors import UsageError
from peftkit.planning.survey import Answer

FORMATS = (".png", ".svg", ".pdf")


def check_chart(file: Path) -> None:
    """Refuse a picture that cannot be written, before anything is counted.

    Raises:
        UsageError: another kind of file, or a folder that cannot be written to.
    """
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"--chart: {file} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    require_writable(file)


def draw(answers: Sequence[Answer], title: str, file: Path) -> None:
    """Bars on a logarithmic scale, the smallest method at the top; one that trains nothing or cannot be has no bar.

    A dashed line is the budget, and the head, which trains beside it.
    """
    from matplotlib.figure import Figure

    shown = [answer for answer in reversed(answers) if answer.trainable]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), [answer.trainable for answer in shown], height=0.7)
    axes.bar_label(bars, [f"{answer.trainable:,}" for answer in shown], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{answer.label}  {answer.size}".rstrip() for answer in shown], fontsize=8)
    axes.set(xlabel="parameters that train", title=title)
    axes.margins(x=0.2, y=0.02)
    if shown:
        axes.set_xscale("log")
        if (budget := shown[0].budget) and (counts := shown[0].counts):
            axes.axvline(budget + counts.head_parameters, color="0.4", linestyle="--", linewidth=1)
    with whole_file(file) as partial:
        figure.savefig(partial, format=file.suffix.lower()[1:], dpi=120)
