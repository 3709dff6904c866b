"""A grid of runs: backbones × data sets × methods × amounts of training data, over seeds. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from peftkit.backbones.load import BackboneSettings
from peftkit.bench.entries import GridData, GridMethod, Partial
from peftkit.bench.matched import Matched, matched
from peftkit.bench.probes import Name, Probe, Probes, listed, misfit, probe_of, with_kinds
from peftkit.bench.store import Key, Phase, PlannedCell
from peftkit.config import Run, run_id, validate
from peftkit.config_file import Document, read_document
from peftkit.config_problems import problems
from peftkit.data.augment import AnyAugmentation
from peftkit.data.mix import missing_files
from peftkit.engine.settings import Engine
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import AnyMethod, Prompting
from peftkit.schema import Section, did_you_mean
from peftkit.tasks.language_model import LanguageModel
from peftkit.tasks.prompted import Prompted

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Tuning(Section):
    """How a learning rate is chosen."""

    seed: Seed = 0
    extensions: Annotated[int, Field(ge=0)] = 2
    """How many rates beyond the given ones are tried at most, one after the other."""


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
    probe: Probes | None = None
    """What is looked at for forgetting; of several, the first that fits the model of a task."""
    robustness: tuple[AnyAugmentation, ...] = ()
    """Changes of the test texts under which the tuned model is scored again."""

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A probe is of features unless it says otherwise."""
        return tree | {"probe": with_kinds(tree["probe"])} if "probe" in tree else tree

    @model_validator(mode="after")
    def _names_what_there_is(self) -> Grid:
        for name, one in self.data.items():
            _refuse_unknown(f"data.{name}.backbones", one.backbones, self.backbones)
        for name, method in self.methods.items():
            _refuse_unknown(f"methods.{name}.data", method.data, self.data)
        return self

    @model_validator(mode="after")
    def _compares(self) -> Grid:
        for name, data in self.data.items():
            kinds = {one.method.kind for one in self.methods.values() if not one.data or name in one.data}
            if missing := [kind for kind in data.always if kind not in kinds]:
                rates = "" if missing[0] == "prompting" else ", learning_rates: […]"
                raise ValueError(
                    f"methods lack {' and '.join(missing)} on data.{name}, beside which the others are judged; add "
                    f"`{missing[0]}: {{method: {{kind: {missing[0]}}}{rates}}}`"
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
        named = json.dumps([run_id(run), phase, self.budget, measured], sort_keys=True)
        return Planned(hashlib.sha256(named.encode()).hexdigest()[:16], key, run)


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
    document = read_document(path, overrides)
    try:
        grid = Grid.model_validate_json(json.dumps(Grid.completed(document.tree)), strict=True)
    except ValidationError:
        raise ConfigError(problems(document, Grid)) from None
    check_cells(grid, str(path))
    return grid


def check_cells(grid: Grid, source: str) -> None:
    """Refuse a grid with cells that cannot be run, or that are the same run under two names."""
    found: dict[str, str] = {}
    told: list[str] = []
    for cell in cells(grid, source):
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


def _impossible(run: Run, probes: Sequence[Probe]) -> Iterator[str]:
    """What settings alone do not show."""
    if run.method.kind == "head" and isinstance(run.task, LanguageModel | Prompted):
        yield f"task '{run.task.kind}' has no head that could be trained; name the method's data sets in its `data`"
    if probes and probe_of(tuple(probes), run.task) is None:
        yield misfit(probes, run.task)


def _drawn_by(seed: int, method: AnyMethod) -> AnyMethod:
    """The method with the solved rows that a seed draws."""
    return method.model_copy(update={"seed": seed}) if isinstance(method, Prompting) and method.shots else method


def _refuse_unknown(where: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: no '{name}'{did_you_mean(name, known)}")


def _as_written(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_unset=True)
