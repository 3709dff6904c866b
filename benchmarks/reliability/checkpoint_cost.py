"""What a checkpoint costs: seconds in saving as a share of training, at one checkpoint a minute, on MiniLM.

A short run with a checkpoint every two steps tells the seconds of a step and of a save. In the full tier a second one
trains for two checkpoints about a minute apart, and the share is that of its time until the second is saved. Seconds of
the processor are those of all threads of the process; where other work shares the machine, they say more than the
clock. Saving is all that training waits for: collecting the state, writing, hashing, fsync, reading back, and removing
what is older.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reliability.forks import main_of
from benchmarks.reliability.workbench import METHODS, Workbench

WITHIN, MORE = "within 3 %", "more than 3 %"
GOOD = (WITHIN,)
MOST = 0.03
MINUTE = 60.0
BATCH = 16
STEPS, SAVES = 8, 2
"""Of the short run, of which every second step is saved, and checkpoints of the long one."""


@dataclass(frozen=True)
class Save:
    """One save: its first moment, and its seconds of the clock and of the processor."""

    began: float
    seconds: float
    processor: float


def trials(tier: str) -> list[str]:
    return ["lora-saves", "full-saves"] if tier == "short" else ["lora-minutes", "full-minutes"]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    method, _, kind = trial.partition("-")
    saves, _ = _trained(method, column, bench, folder / "short", STEPS, 2)
    share = statistics.median(save.seconds for save in saves) / MINUTE
    found = {"saves": _rounded(saves), "share": round(share, 5)}
    if kind == "minutes":
        between = [after.began - before.began - before.seconds for before, after in itertools.pairwise(saves)]
        every = round(MINUTE / (statistics.median(between) / 2))
        saves, seconds = _trained(method, column, bench, folder / "long", every * SAVES, every)
        share = sum(save.seconds for save in saves) / seconds
        found |= {"long_saves": _rounded(saves), "long_seconds": round(seconds, 1), "long_share": round(share, 5)}
    return {"outcome": WITHIN if share <= MOST else MORE} | found


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The shares, by trial."""
    return {row["trial"]: row.get("long_share", row["share"]) for row in rows}


def _rounded(saves: list[Save]) -> list[list[float]]:
    return [[round(save.seconds, 3), round(save.processor, 3)] for save in saves]


def _trained(
    method: str, column: str, bench: Workbench, folder: Path, steps: int, every: int
) -> tuple[list[Save], float]:
    """Train MiniLM; its saves, and the seconds from its first step to the end of the last of them."""
    folder.mkdir()
    arguments = (_peftkit if column == "peftkit" else _stock)(method, bench, folder, steps, every)
    with _timed(column) as (saves, starts):
        if code := main_of(column)(arguments):
            raise RuntimeError(f"{column} ended with {code}")
    del saves[steps // every :]  # Trainer saves the last step once more
    return saves, saves[-1].began + saves[-1].seconds - starts[0]


def _peftkit(method: str, bench: Workbench, folder: Path, steps: int, every: int) -> list[str]:
    settings = {"max_steps": steps, "batch_size": BATCH, "checkpoint_every": every, "evaluate_every": steps}
    config = bench.peftkit_config(METHODS[method], **settings, keep_best=False)
    config["backbone"]["name"] = "bundled:minilm"
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["train", str(folder / "config.yaml"), f"output.folder={folder / 'run'}"]


def _stock(method: str, bench: Workbench, folder: Path, steps: int, every: int) -> list[str]:
    from peftkit.backbones.bundled import fetch

    config = {"backbone": str(fetch("minilm")), "train": bench.data["train"], "method": method, "seed": 1}
    config |= {"output": str(folder / "run"), "learning_rate": 0.002, "max_steps": steps}
    config |= {"per_device_train_batch_size": BATCH, "save_steps": every}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return [str(folder / "config.json")]


@contextmanager
def _timed(column: str) -> Iterator[tuple[list[Save], list[float]]]:
    """The saves made within it, and when training began."""
    if column == "peftkit":
        from peftkit.training.checkpoint import Checkpoints as owner
        from peftkit.training.loop import _Loop as trainer

        save, train = "save", "run_to_end"
    else:
        from transformers import Trainer as owner

        trainer, save, train = owner, "_save_checkpoint", "_inner_training_loop"
    saves, starts = list[Save](), list[float]()
    saved, trained = getattr(owner, save), getattr(trainer, train)

    def timed(*given: Any, **named: Any) -> None:
        began, processor = time.perf_counter(), time.process_time()
        saved(*given, **named)
        saves.append(Save(began, time.perf_counter() - began, time.process_time() - processor))

    def started(*given: Any, **named: Any) -> Any:
        starts.append(time.perf_counter())
        return trained(*given, **named)

    setattr(owner, save, timed)
    setattr(trainer, train, started)
    try:
        yield saves, starts
    finally:
        setattr(owner, save, saved)
        setattr(trainer, train, trained)
