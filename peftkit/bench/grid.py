"""A grid of runs: backbones × data sets × methods × amounts of training data, over seeds. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from peftkit.backbones.load import BackboneSettings
from peftkit.bench.store import Key, Phase, PlannedCell
from peftkit.config import Run, settings_of, validate
from peftkit.config_file import Document, read_document
from peftkit.config_problems import problems
from peftkit.data.augment import AnyAugmentation
from peftkit.data.mix import AnyData, missing_files
from peftkit.engine.settings import Engine
from peftkit.errors import ConfigError
from peftkit.methods import AnyMethod
from peftkit.schema import Section
from peftkit.tasks import AnyTask

Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w.()+ -]+$")]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Partial = dict[str, Any]
"""Some settings of a section; they are checked in every run that they become part of."""
ALWAYS = ("full", "head")
"""Kinds without which a comparison says little: what the cheap methods stand in for, and the cheapest of all."""


class GridData(Section):
    """A task, and how long it is trained on: the same for every method."""

    task: AnyTask
    training: Partial = Field(default_factory=dict)


class GridMethod(Section):
    """A method, and the learning rates that are tried for it."""

    method: AnyMethod
    learning_rates: tuple[Rate, ...] = ()
    """Ascending. Where the best on dev is the first or the last, one more beyond it is tried."""
    training: Partial = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_rates(self) -> GridMethod:
        if self.method.trains != bool(self.learning_rates):
            raise ValueError(
                "learning_rates are missing: give those to try, such as [1e-4, 2e-4, 4e-4, 8e-4]"
                if self.method.trains
                else f"learning_rates: method '{self.method.kind}' trains nothing; leave them out"
            )
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise ValueError("learning_rates must ascend")
        return self


class Tuning(Section):
    """How a learning rate is chosen."""

    seed: Seed = 0
    extensions: Annotated[int, Field(ge=0)] = 2
    """How many rates beyond the given ones are tried at most, one after the other."""


class FeatureProbe(Section):
    """What an encoder forgets: a linear classifier of texts on its mean features, fitted before it is tuned."""

    kind: Literal["features"] = "features"
    name: Name
    data: AnyData
    text: str = "text"
    label: str = "label"
    rows: Annotated[int, Field(gt=0)] = 800
    """Of train to fit on, and of test to score, spread over each."""
    max_length: Annotated[int, Field(gt=2)] = 64


class Grid(Section):
    """What is compared."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w-]+$")]
    backbones: dict[Name, BackboneSettings]
    data: dict[Name, GridData]
    methods: dict[Name, GridMethod]
    budgets: tuple[Literal["all"] | Annotated[int, Field(gt=0)], ...] = ("all",)
    """Training rows: all, or so many of each class (of tasks without classes: in all), drawn anew for each seed."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Each changes the head's and the method's initialisation, dropout, and the order of the data, which is the same
    for all methods."""
    tuning: Tuning = Tuning()
    training: Partial = Field(default_factory=dict)
    engine: Engine = Engine()
    probe: FeatureProbe | None = None
    robustness: tuple[AnyAugmentation, ...] = ()
    """Changes of the test texts under which the tuned model is scored again."""

    @model_validator(mode="after")
    def _compares(self) -> Grid:
        kinds = {one.method.kind for one in self.methods.values()}
        if missing := [kind for kind in ALWAYS if kind not in kinds]:
            raise ValueError(
                f"methods lack {' and '.join(missing)}, beside which the others are judged; add "
                f"`{missing[0]}: {{method: {{kind: {missing[0]}}}, learning_rates: […]}}`"
            )
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is one of seeds; choose another, for fairness")
        for name in ("seeds", "budgets"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has one value twice")
        return self


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
        tree = {
            "backbone": _as_written(grid.backbones[self.backbone]),
            "task": _as_written(data.task),
            "method": _as_written(method.method),
            "training": training,
            "engine": grid.engine.model_dump(mode="json"),
        }
        return validate(Document(f"{self.source} ({self.name})", tree))

    @cached_property
    def _settings(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Of the first run: section → what of it counts, and that as it is hashed."""
        return {name: (section, _canonical(section)) for name, section in sorted(settings_of(self._first).items())}

    @cached_property
    def _measured(self) -> dict[str, Any]:
        return self.grid.model_dump(mode="json", include={"probe", "robustness"})

    @cached_property
    def _known(self) -> dict[tuple[Phase, int, float | None], Planned]:
        return {}

    def _planned(self, phase: Phase, seed: int, learning_rate: float | None) -> Planned:
        found = self._known.get((phase, seed, learning_rate))
        return found or self._known.setdefault((phase, seed, learning_rate), self._made(phase, seed, learning_rate))

    def _made(self, phase: Phase, seed: int, learning_rate: float | None) -> Planned:
        training = self._first.training.model_copy(update={"seed": seed, "learning_rate": learning_rate})
        run = self._first.model_copy(update={"training": training})
        key = Key(
            grid=self.grid.name,
            backbone=self.backbone,
            data=self.data,
            method=self.method,
            budget=self.budget,
            phase=phase,
            seed=seed,
            learning_rate=learning_rate,
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
            for budget in grid.budgets:
                for method in grid.methods:
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
        grid = Grid.model_validate_json(json.dumps(document.tree), strict=True)
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
        if (same := found.setdefault(planned.id, cell.name)) != cell.name:
            told.append(f"{source}: {cell.name} is the same run as {same}; leave one out")
    for name, data in grid.data.items():
        told += [f"{source}: data.{name}: {problem}" for problem in missing_files(data.task.data)]
    if grid.probe is not None:
        told += [f"{source}: probe: {problem}" for problem in missing_files(grid.probe.data)]
    if told:
        raise ConfigError(list(dict.fromkeys(told)))
    return every


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_written(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_unset=True)
