"""`peftkit bench`: its verbs' options, and what `run` and `status` do and say."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.console import positive, say
from peftkit.errors import PeftkitError, UsageError

if TYPE_CHECKING:
    from peftkit.bench.cells import Cell
    from peftkit.bench.grid import Grid
    from peftkit.bench.launch import Engine, State
    from peftkit.bench.tuning import Progress


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add_status_options(parser)
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where runs take place")
    parser.add_argument("--workers", type=positive, metavar="N", help="runs at a time (default: one for each core)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="what all runs of this machine may take together, such as 24GiB (default: what is free)",
    )
    parser.add_argument(
        "--processes",
        choices=("forked", "fresh"),
        help="in which runs of this machine are made: forks of one that holds libraries, data and weights (default on "
        "Linux without a GPU), or fresh ones",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a Ray cluster to join (default: RAY_ADDRESS, or one of this machine)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="make at most N runs now")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed or ran out of memory")


def add_status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="GRID")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the results (default: runs/bench/<name>)")
    parser.add_argument("--data", action="append", default=[], metavar="NAME", help="only this data set; repeatable")
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help="only this method; repeatable")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> None:
    """Run what is left, and say how far the grid is.

    Raises:
        PeftkitError: runs failed.
    """
    grid, chosen = _chosen(options)
    from peftkit.bench.cells import planned_cells
    from peftkit.bench.launch import run_cells
    from peftkit.bench.store import Store

    if options.ray_address and options.engine != "ray":
        raise UsageError("--ray-address goes with --engine ray")
    if options.processes and options.engine != "local":
        raise UsageError("--processes goes with --engine local")
    store = Store(_folder(grid, options))
    with _engine(options) as engine:
        store.plan(planned_cells(grid))
        for record in list(store.records()):
            if options.retry_failed and record.status != "finished":
                store.remove(record.id)
        _tell_damaged(store.damaged)
        _tell_matched(chosen)
        state = run_cells(chosen, store, engine, say, options.limit)
    _tell(state, store.folder, options.json)
    failed = [record for record in state.records.values() if record.status != "finished"]
    if failed:
        first = failed[0]
        raise PeftkitError(f"{len(failed)} runs failed, first {first.id}: {first.error}; see {store.folder}/runs")


@contextmanager
def _engine(options: argparse.Namespace) -> Iterator[Engine]:
    from peftkit.planning.machines import memory_size

    memory = memory_size(options.memory) if options.memory else None
    if options.engine == "ray":
        from peftkit.bench.cluster import cluster

        with cluster(options.ray_address, options.workers, memory, say) as engine:
            yield engine
        return
    from peftkit.bench.processes import Processes, default_workers

    fork = options.processes != "fresh"
    with closing(Processes(options.workers or default_workers(), say, memory, fork)) as engine:
        yield engine


def status(options: argparse.Namespace) -> None:
    """Say how far a grid is, and what is left."""
    grid, chosen = _chosen(options)
    from peftkit.bench.launch import state_of
    from peftkit.bench.store import Store

    store = Store(_folder(grid, options))
    records = {record.id: record for record in store.records()}
    _tell_damaged(store.damaged)
    if not options.json:
        _tell_matched(chosen)
    _tell(state_of(chosen, records), store.folder, options.json)


def _chosen(options: argparse.Namespace) -> tuple[Grid, list[Cell]]:
    from peftkit.bench.cells import load_cells
    from peftkit.schema import did_you_mean

    grid, cells = load_cells(options.grid, options.overrides)
    for name, asked, known in (("data", options.data, grid.data), ("method", options.method, grid.methods)):
        if foreign := [one for one in asked if one not in known]:
            raise UsageError(f"--{name} {foreign[0]}: not in {options.grid}{did_you_mean(foreign[0], known)}")
    return grid, [
        cell
        for cell in cells
        if cell.data in (options.data or grid.data) and cell.method in (options.method or grid.methods)
    ]


def _folder(grid: Grid, options: argparse.Namespace) -> Path:
    from peftkit.bench.store import RESULTS

    return options.folder or RESULTS / grid.name


def _tell_damaged(damaged: dict[str, str]) -> None:
    for name, why in damaged.items():
        say(f"runs/{name} cannot be read ({why}); it counts as not there and is made again")


def _tell_matched(chosen: list[Cell]) -> None:
    found = {(cell.backbone, cell.method): str(cell.matched) for cell in chosen if cell.matched}
    for (backbone, method), told in found.items():
        say(f"{method} on {backbone}: {told}")


def _tell(state: State, folder: Path, as_json: bool) -> None:
    from peftkit.tables import table

    rows = [_row(state, cell, found) for cell, found in state.cells]
    if as_json:
        say(json.dumps({"folder": str(folder), "cells": rows}, indent=2))
        return
    lines = [["cell", "state", "trials", "learning rate", "seeds", "mean"]]
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}{' (edge)' if row['at_edge'] else ''}"
        mean = "" if row["mean"] is None else f"{row['mean']:.4f}"
        lines.append([row["cell"], row["state"], str(row["trials"]), rate, f"{row['seeds']}/{row['of']}", mean])
    say(table(lines))
    states = Counter(row["state"] for row in rows)
    say(f"{folder}: " + ", ".join(f"{count} cells {name}" for name, count in states.items()))


def _row(state: State, cell: Cell, found: Progress) -> dict[str, Any]:
    trials = [state.records.get(cell.trial(rate).id) for rate in found.rates]
    tuned = found.state in ("final", "done")
    finals = [state.records.get(cell.final(seed, found.learning_rate).id) for seed in cell.grid.seeds] if tuned else []
    scores = [one.test.value for one in finals if one and one.test]
    return {
        "cell": cell.name,
        "state": found.state,
        "trials": sum(one is not None for one in trials),
        "learning_rate": found.learning_rate,
        "at_edge": found.at_edge,
        "seeds": len(scores),
        "of": len(cell.grid.seeds),
        "mean": sum(scores) / len(scores) if scores else None,
        "next": len(found.runs),
    }
