"""What came of the runs of a grid, one file each, so that nothing finished is done again. Imports nothing heavy.

A folder of results holds `runs/<id>.json` (a `Record`) and, of runs that were scored on test, `answers/<id>.json.gz`
(its `Answers`). Both are written whole or not at all, a record after its answers. `planned.json` names the cells that
were asked for, so that a report shows what is missing.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from peftkit.disk import whole_file
from peftkit.errors import UsageError
from peftkit.schema import Section

RUNS, ANSWERS, PLANNED = "runs", "answers", "planned.json"
RESULTS = Path("runs") / "bench"
"""Where the results of a grid go, in a folder of its name, unless told otherwise."""
Phase = Literal["trial", "final"]


class Key(Section):
    """Which run of a grid it is."""

    grid: str
    backbone: str
    data: str
    method: str
    budget: str
    """Of training rows: `all`, or how many of each class, as `16`."""
    phase: Phase
    """A trial chooses a learning rate on dev; final runs are scored on test."""
    seed: int
    learning_rate: float | None
    """None where the method trains nothing."""
    parameters: int | None = None
    """Of a method that was brought to a number of trainable parameters, beside the head's: that number."""
    score: str | None = None
    """The figure that is compared; None for the task's headline."""

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """(backbone, data, budget, method): what differs within it are seeds and learning rates."""
        return (self.backbone, self.data, self.budget, self.method)


class PlannedCell(Section):
    """A cell of a grid, and the seeds that its final runs are to have."""

    backbone: str
    data: str
    budget: str
    method: str
    seeds: tuple[int, ...]


class Score(Section):
    """The headline figure of a task, and the others."""

    headline: str
    value: float
    lower_is_better: bool = False
    values: dict[str, float] = Field(default_factory=dict)


class Forgetting(Section):
    """What became of something that the backbone could do before it was tuned."""

    probe: str
    before: float
    after: float
    refitted: float | None = None
    """Of classifiers on frozen features: the same classifier, fitted anew to the tuned backbone's features."""
    lower_is_better: bool = False


class Cost(Section):
    """What the run took. `seconds` is of training steps alone."""

    seconds: float
    steps: int
    tokens: int
    tokens_per_second: float
    evaluation_seconds: float | None = None
    """Of the test split, once."""
    evaluation_rows: int | None = None
    peak_memory_bytes: int
    memory_growth_bytes: int | None = None
    """What of the peak came with the model and its training."""


class Record(Section):
    """What came of one run."""

    format: Literal[1] = 1
    id: str
    key: Key
    status: Literal["finished", "failed", "out_of_memory"]
    error: str | None = None
    dev: Score | None = None
    """Of the kept weights."""
    best_step: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    """(step, headline on dev)."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, mean training loss since the point before), at most a hundred points."""
    test: Score | None = None
    majority: Score | None = None
    untuned: Score | None = None
    """Of the backbone with a fresh head; scored once for a backbone, data set and seed."""
    merged: Score | None = None
    """Of the same weights as one plain model, where the method merges."""
    merged_answers_changed: int | None = None
    robustness: dict[str, Score] = Field(default_factory=dict)
    """Of the test texts changed, by the kind of change."""
    elsewhere: dict[str, Score] = Field(default_factory=dict)
    """Of other data with the same labels, by its name."""
    forgetting: Forgetting | None = None
    trainable_parameters: int = 0
    head_parameters: int = 0
    """Those of `trainable_parameters` that are the task's head, which every method trains."""
    total_parameters: int = 0
    saved_parameters: int = 0
    artifact_bytes: int = 0
    cost: Cost | None = None
    run: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration."""
    notes: tuple[str, ...] = ()
    """What was done to the rows, such as texts that were cut, in plain words."""
    data_sha256: str = ""
    """Of tokens and labels that were trained and selected on."""
    code: str = ""
    """A hash of the package's own source."""
    environment: dict[str, Any] = Field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that decide what a run computes."""
        return dict(self.environment.get("versions", {}))


class Answers(Section):
    """What a model answered on test, and what each answer counts for.

    The headline is `transform(Σ numerators / Σ denominators)` where it is a ratio of sums, as accuracy (right answers
    and ones), micro F1 (2 · true positives, and predicted plus referenced), or perplexity (negative log likelihoods
    and tokens); where it is none, both are empty.
    """

    predictions: tuple[Any, ...]
    numerators: tuple[float, ...] = ()
    denominators: tuple[float, ...] = ()
    transform: Literal["identity", "exp"] = "identity"


_PLAN = TypeAdapter(tuple[PlannedCell, ...])


class Store:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[str, str] = {}
        """Record files that could not be read, and why; they count as not there, and are written anew."""

    def add(self, record: Record, answers: Answers | None = None) -> None:
        """Keep what came of a run, in place of an earlier try."""
        if answers is not None:
            packed = gzip.compress(answers.model_dump_json().encode(), mtime=0)
            with whole_file(self._answers(record.id)) as partial:
                partial.write_bytes(packed)
        with whole_file(self._record(record.id)) as partial:
            partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def plan(self, cells: Iterable[PlannedCell]) -> None:
        """Keep which cells were asked for, in the order in which a report shows their methods."""
        with whole_file(self.folder / PLANNED) as partial:
            partial.write_bytes(_PLAN.dump_json(tuple(cells), indent=1) + b"\n")

    def planned(self) -> tuple[PlannedCell, ...]:
        """The cells that were asked for; none where nobody said.

        Raises:
            UsageError: a damaged file.
        """
        file = self.folder / PLANNED
        try:
            return _PLAN.validate_json(file.read_bytes()) if file.exists() else ()
        except ValidationError as error:
            raise UsageError(
                f"{file}: not a list of planned cells ({_short(error)}); remove it, and "
                "`peftkit bench run` writes it again"
            ) from None

    def remove(self, name: str) -> None:
        """Forget a run."""
        self._record(name).unlink(missing_ok=True)
        self._answers(name).unlink(missing_ok=True)

    def records(self) -> Iterator[Record]:
        """Every run that is there and whole, by id."""
        self.damaged.clear()
        for file in sorted((self.folder / RUNS).glob("*.json")):
            try:
                record = _read(file)
            except (OSError, ValueError) as error:
                self.damaged[file.name] = _short(error)
            else:
                yield record

    def find(self, name: str) -> Record | None:
        """The run of that id, if it is there and whole."""
        try:
            return _read(self._record(name))
        except (OSError, ValueError):
            return None

    def answers(self, name: str) -> Answers:
        """What the run of that id answered on test.

        Raises:
            UsageError: no such file, or a damaged one.
        """
        file = self._answers(name)
        try:
            return Answers.model_validate_json(gzip.decompress(file.read_bytes()))
        except (OSError, EOFError, zlib.error, ValidationError) as error:
            raise UsageError(
                f"{file}: the answers of this run cannot be read ({_short(error)}); remove runs/{name}.json beside it, "
                "and `peftkit bench run` makes both again"
            ) from None

    def _record(self, name: str) -> Path:
        return self.folder / RUNS / f"{name}.json"

    def _answers(self, name: str) -> Path:
        return self.folder / ANSWERS / f"{name}.json.gz"


def _read(file: Path) -> Record:
    """A record; raises OSError or ValueError where it is not there, not whole, or another's."""
    record = Record.model_validate_json(file.read_bytes())
    if record.id != file.stem:
        raise ValueError(f"it holds run {record.id}")
    return record


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error) or type(error).__name__
