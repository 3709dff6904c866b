"""Small grids for tests: written as files, read back, run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.bench.cells import cells, load_grid
from peftkit.bench.grid import Grid
from peftkit.bench.launch import job_of, state_of
from peftkit.bench.store import Record, Score, Store
from peftkit.bench.worker import outcome
from peftkit.errors import ConfigError


def toy_tree(tiny_bert: Path, toy_data: Path) -> dict[str, Any]:
    """A small grid as YAML holds it."""
    files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    return {
        "name": "toy",
        "backbones": {"tiny": {"name": str(tiny_bert)}},
        "data": {"toy": {"task": {"kind": "sequence_classification", "data": files, "max_length": 32}}},
        "methods": {
            "full": {"method": {"kind": "full"}, "learning_rates": [1e-3, 4e-3]},
            "head": {"method": {"kind": "head"}, "learning_rates": [1e-2]},
        },
        "seeds": [1, 2],
        "tuning": {"extensions": 0},
        "training": {"max_steps": 6, "evaluate_every": 3, "batch_size": 16},
    }


def write(tree: dict[str, Any], folder: Path) -> Path:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def grid_of(tree: dict[str, Any], folder: Path) -> Grid:
    return load_grid(write(tree, folder))


def problems_of(tree: dict[str, Any], folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_grid(write(tree, folder))
    return str(caught.value)


def record_of(planned: Any, dev: float | None, lower: bool = False) -> Record:
    score = None if dev is None else Score(headline="accuracy", value=dev, lower_is_better=lower)
    status: Any = "failed" if dev is None else "finished"
    return Record(id=planned.id, key=planned.key, status=status, dev=score)


def run_here(grid: Grid, store: Store) -> None:
    """All that is left of a grid, one run after the other, without any worker."""
    every = list(cells(grid))
    while pending := state_of(every, {one.id: one for one in store.records()}).pending:
        for planned in pending:
            store.add(*outcome(job_of(planned, grid, store.folder)))
