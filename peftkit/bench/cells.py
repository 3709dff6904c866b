"""The cells of a grid, and the runs of each, known by what they compute. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.bench.grid import Grid
from peftkit.bench.matched import Matched, matched
from peftkit.bench.probes import Probe, listed, misfit, probe_of
from peftkit.bench.store import Key, Phase, PlannedCell
from peftkit.config import Run, settings_of, validate
from peftkit.config_file import Document, read_document
from peftkit.config_problems import problems
from peftkit.data.mix import missing_files
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import AnyMethod, Prompting
from peftkit.schema import Section
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.prompted import Prompted


@dataclass(frozen=True)
class Planned:
    """A run of a grid."""

    id: str
    key: Key
    run: Run


@dataclass(frozen=True)
class Cell:
    """One backbone, data set, method and budget of a grid: trials, and then a run for each seed."""

    grid: Grid
    source: str
    backbone: str
    data: str
    method: str
    budget: str

    @property
    def name(self) -> str:
        """For people."""
        rows = "" if self.budget == "all" else f" × {self.budget} rows"
        return f"{self.backbone} × {self.data} × {self.method}{rows}"

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried in any case."""
        return self.grid.methods[self.method].learning_rates

    @property
    def matched(self) -> Matched | None:
        """How the method was brought to a number of parameters, where it was."""
        parameters, run = self.grid.methods[self.method].parameters, self._first
        return matched(run.method, run.backbone, run.task, parameters) if parameters else None

    def trial(self, learning_rate: float) -> Planned:
        """The run that is scored on dev alone."""
        return self._planned("trial", self.grid.tuning.seed, learning_rate)

    def final(self, seed: int, learning_rate: float | None) -> Planned:
        """The run that is scored on test."""
        return self._planned("final", seed, learning_rate)

    @cached_property
    def _first(self) -> Run:
        """The run that the others differ from in seed and learning rate alone, checked once for all of them."""
        grid, data, method = self.grid, self.grid.data[self.data], self.grid.methods[self.method]
        training = grid.training | data.training | method.training
        training |= {"seed": grid.seeds[0], "learning_rate": next(iter(self.rates), None)}
        longest = {} if method.max_length is None else {"max_length": method.max_length}
        tree = {
            "backbone": _as_written(grid.backbones[self.backbone]) | method.backbone,
            "task": _as_written(data.task) | longest,
            "method": _as_written(method.method),
            "training": training,
            "engine": grid.engine.model_dump(mode="json"),
        }
        run = validate(Document(f"{self.source} ({self.name})", tree))
        if method.parameters is None:
            return run
        found = matched(run.method, run.backbone, run.task, method.parameters)
        sized = tree | {"method": tree["method"] | {found.name: found.size}}
        return validate(Document(f"{self.source} ({self.name})", sized))

    @cached_property
    def _settings(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Of the first run: section → what of it counts, and that as it is hashed."""
        return {name: (section, _canonical(section)) for name, section in sorted(settings_of(self._first).items())}

    @cached_property
    def _measured(self) -> dict[str, Any]:
        probe, score = probe_of(self.grid.probe, self._first.task), self.grid.data[self.data].score
        measured = self.grid.model_dump(mode="json", include={"robustness"})
        measured["probe"] = None if probe is None else probe.model_dump(mode="json")
        more = {"score": score, "elsewhere": self._elsewhere}
        return measured | {name: value for name, value in more.items() if value}

    @property
    def _elsewhere(self) -> dict[str, Any]:
        return {name: one.model_dump(mode="json") for name, one in self.grid.data[self.data].elsewhere.items()}

    @cached_property
    def _known(self) -> dict[tuple[Phase, int, float | None], Planned]:
        return {}

    def _planned(self, phase: Phase, seed: int, learning_rate: float | None) -> Planned:
        found = self._known.get((phase, seed, learning_rate))
        return found or self._known.setdefault((phase, seed, learning_rate), self._made(phase, seed, learning_rate))

    def _made(self, phase: Phase, seed: int, learning_rate: float | None) -> Planned:
        training = self._first.training.model_copy(update={"seed": seed, "learning_rate": learning_rate})
        run = self._first.model_copy(update={"training": training, "method": _drawn_by(seed, self._first.method)})
        key = Key(
            grid=self.grid.name,
            backbone=self.backbone,
            data=self.data,
            method=self.method,
            budget=self.budget,
            phase=phase,
            seed=seed,
            learning_rate=learning_rate,
            parameters=self.grid.methods[self.method].parameters,
            score=self.grid.data[self.data].score,
        )
        measured = self._measured if phase == "final" else {}
        return Planned(_hash(_canonical([self._run_id(run), phase, self.budget, measured])), key, run)

    def _run_id(self, run: Run) -> str:
        """What `run_id` says, for which only the sections that differ from the first run's are written out anew."""
        texts = []
        for name, (counts, text) in self._settings.items():
            section = getattr(run, name)
            if section is not getattr(self._first, name):
                dumped = section.model_dump(mode="json")
                text = _canonical({one: dumped[one] for one in counts})
            texts.append(f'"{name}": {text}')
        return _hash(f"{{{', '.join(texts)}}}")


def cells(grid: Grid, source: str = "grid") -> Iterator[Cell]:
    """Every cell, data set by data set."""
    for backbone in grid.backbones:
        for data in grid.data:
            if backbone not in (grid.data[data].backbones or grid.backbones):
                continue
            for budget in grid.budgets:
                for method, settings in grid.methods.items():
                    if data in (settings.data or grid.data):
                        yield Cell(grid, source, backbone, data, method, str(budget))


def planned_cells(grid: Grid) -> list[PlannedCell]:
    """What a report of the grid is to show, there or missing."""
    return [
        PlannedCell(backbone=one.backbone, data=one.data, budget=one.budget, method=one.method, seeds=grid.seeds)
        for one in cells(grid)
    ]


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """A grid, every cell of which can be run.

    Raises:
        UsageError: the file cannot be read.
        ConfigError: every problem at once: settings, impossible cells, cells that are the same, data that is not here.
    """
    return load_cells(path, overrides)[0]


def load_cells(path: Path, overrides: Sequence[str] = ()) -> tuple[Grid, list[Cell]]:
    """A grid and its cells, which were all checked. Raises as `load_grid` does."""
    document = read_document(path, overrides)
    try:
        grid = Grid.model_validate_json(json.dumps(Grid.completed(document.tree)), strict=True)
    except ValidationError:
        raise ConfigError(problems(document, Grid)) from None
    return grid, check_cells(grid, str(path))


def check_cells(grid: Grid, source: str) -> list[Cell]:
    """The cells of a grid; refuses those that cannot be run, or that are the same run under two names."""
    every = list(cells(grid, source))
    found: dict[str, str] = {}
    told: list[str] = []
    for cell in every:
        try:
            planned = cell.final(grid.seeds[0], next(iter(cell.rates), None))
        except ConfigError as error:
            told += error.problems
            continue
        except UsageError as error:
            told.append(f"{source} ({cell.name}): {error}")
            continue
        told += [f"{source} ({cell.name}): {problem}" for problem in _impossible(planned.run, listed(grid.probe))]
        if (same := found.setdefault(planned.id, cell.name)) != cell.name:
            told.append(f"{source}: {cell.name} is the same run as {same}; leave one out")
    for name, data in grid.data.items():
        for one in (data.task.data, *data.elsewhere.values()):
            told += [f"{source}: data.{name}: {problem}" for problem in missing_files(one)]
    for probe in listed(grid.probe):
        told += [f"{source}: probe: {problem}" for problem in missing_files(probe.data)]
    if told:
        raise ConfigError(list(dict.fromkeys(told)))
    return every


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _impossible(run: Run, probes: Sequence[Probe]) -> Iterator[str]:
    """What settings alone do not show."""
    if run.method.kind == "head" and isinstance(run.task, LanguageModel | Prompted):
        yield f"task '{run.task.kind}' has no head that could be trained; name the method's data sets in its `data`"
    if probes and probe_of(tuple(probes), run.task) is None:
        yield misfit(probes, run.task)


def _drawn_by(seed: int, method: AnyMethod) -> AnyMethod:
    """The method with the solved rows that a seed draws."""
    return method.model_copy(update={"seed": seed}) if isinstance(method, Prompting) and method.shots else method


def _as_written(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_unset=True)
