"""An arm of peftkit: the command `peftkit train` in a process of its own, and what the run folder says of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.speed.processes import run


def train(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Figures of a training."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        run(["-m", "peftkit.cli", "train", str(config), *overrides, f"output.folder={place}"])
        return figures(place)


def figures(folder: Path) -> dict[str, Any]:
    """What a run folder says, in the words of all arms."""
    training = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["training"]
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if "loss" in event]
    return {
        "tokens": training["tokens"],
        "seconds": training["seconds"],
        "losses": [event["loss"] for event in steps],
        "mean_tokens_per_second": [event["tokens_per_second"] for event in steps],
        "peak_bytes": training["peak_memory_bytes"],
        "growth_bytes": training["memory_growth_bytes"],
        "trained_parameters": training["trainable_parameters"],
    }


def step_seconds(rates: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """The time of each step, from the mean rates that the log has after each, rounded to a tenth of a token."""
    ends, read = [0.0], 0
    for rate, count in zip(rates, tokens, strict=True):
        read += count
        ends.append(read / rate)
    return [after - before for before, after in pairwise(ends)]
