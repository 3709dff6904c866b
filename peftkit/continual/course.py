"""The trainings that a sequence of tasks consists of, the folders they lie in, and what is kept of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from peftkit.changes import differences, flat, told
from peftkit.config import Run, in_folder
from peftkit.config_file import parse_document, to_yaml
from peftkit.continual.sequence import TaskSequence, run_of, sequence_id, settings_of
from peftkit.disk import file_sha256, require_writable, whole_file, write_text
from peftkit.errors import ArtifactError, UsageError, first_line
from peftkit.prepare import Prepared, prepare
from peftkit.schema import Section
from peftkit.session import MANIFEST

SEQUENCE_FILE = "sequence.yaml"
HEADER = "# sequence "
"""How the first line of `sequence.yaml` starts; the sequence's id follows."""


class Seal(Section):
    """Hashes of the weights that a training ended with, taken from the model itself."""

    shared: str
    """Of what trained outside of the head."""
    head: str


class Row(Section):
    """What a sequence scores once a task was learnt: a row of R."""

    task: str
    seed: int
    manifests: tuple[str, ...]
    """sha256 of the manifests of the runs so far, which name them with all their bytes."""
    headline: str
    scores: tuple[float, ...]
    """On the tests of the tasks so far, this one last."""
    untuned: float
    """On the test of this one: a fresh head on the untouched backbone."""
    before: float | None
    """The same head on what earlier tasks left; None where the task begins with nothing."""
    test_rows: int
    trainable_parameters: int
    steps: int
    seconds: float
    """Of training steps alone."""


@dataclass(frozen=True)
class Course:
    """A sequence in its folder."""

    sequence: TaskSequence
    _prepared: dict[int, Prepared] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it is written."""
        assert self.sequence.output.folder is not None
        return Path(self.sequence.output.folder)

    def stages(self) -> Iterator[Stage]:
        """Every training, seed by seed, in the order of the tasks."""
        for seed in self.sequence.seeds:
            for number in range(len(self.sequence.tasks)):
                yield Stage(self, seed, number)

    def prepared(self, stage: Stage) -> Prepared:
        """Rows and tokens of a task, read once for all seeds."""
        if stage.number not in self._prepared:
            self._prepared[stage.number] = prepare(stage.run)
        return self._prepared[stage.number]


@dataclass(frozen=True)
class Stage:
    """One task of a sequence, learnt with one seed."""

    course: Course
    seed: int
    number: int
    """From 0."""

    @property
    def name(self) -> str:
        """The task's."""
        return self.course.sequence.tasks[self.number].name

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.course.folder / f"seed-{self.seed}" / f"{self.number + 1}-{self.name}"

    @property
    def earlier(self) -> list[Stage]:
        """The tasks that were learnt before it, with the same seed."""
        return [Stage(self.course, self.seed, number) for number in range(self.number)]

    @property
    def before(self) -> Stage | None:
        """The stage whose weights this one begins with."""
        return self.earlier[-1] if self.number and self.course.sequence.carries else None

    @cached_property
    def run(self) -> Run:
        """The training, as any other one."""
        start = None if self.before is None else self.before.folder
        return in_folder(run_of(self.course.sequence, self.number, self.seed, start), str(self.folder))

    @property
    def is_trained(self) -> bool:
        """Whether the run is finished."""
        return (self.folder / MANIFEST).is_file()

    @property
    def manifest_sha256(self) -> str:
        """Names the finished run with all its bytes."""
        return file_sha256(self.folder / MANIFEST)

    @property
    def manifests(self) -> tuple[str, ...]:
        """The same of all runs so far, this one last."""
        return tuple(one.manifest_sha256 for one in (*self.earlier, self))

    def prepare(self) -> Prepared:
        """Rows and tokens of the task."""
        return self.course.prepared(self)

    def keep_seal(self, seal: Seal) -> None:
        """Write the hashes of the trained weights beside the run's folder."""
        self._write("weights", seal)

    def seal(self) -> Seal:
        """What `keep_seal` wrote.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        file = self._file("weights")
        try:
            return Seal.model_validate_json(file.read_bytes(), strict=True)
        except (OSError, ValidationError) as error:
            raise ArtifactError(
                f"{file}: the hashes of the weights of task '{self.name}' cannot be read ({first_line(error)}); remove "
                f"{self.folder} and those of later tasks, and they are trained again"
            ) from None

    def keep_row(self, row: Row) -> None:
        """Write the scores beside the run's folder."""
        self._write("row", row)

    def row(self) -> Row | None:
        """What `keep_row` wrote of these very runs; None where that is missing, damaged or of others."""
        try:
            row = Row.model_validate_json(self._file("row").read_bytes(), strict=True)
            return row if row.manifests == self.manifests else None
        except (OSError, ValidationError):
            return None

    def _file(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{what}.json")

    def _write(self, what: str, section: Section) -> None:
        with whole_file(self._file(what)) as partial:
            partial.write_text(section.model_dump_json(indent=1) + "\n", encoding="utf-8")


def begin(sequence: TaskSequence) -> Course:
    """Take up a sequence where it stopped, or in a new folder.

    Raises:
        UsageError: the folder holds another sequence, or a stranger's files.
    """
    course = Course(sequence)
    folder, file = course.folder, course.folder / SEQUENCE_FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output.folder: {folder} is a file")
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds other files and no {SEQUENCE_FILE}; name an empty or new output.folder")
        require_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        _refuse_other(sequence, file)
    write_text(file, f"{HEADER}{sequence_id(sequence)}\n{to_yaml(sequence.model_dump(mode='json'))}")
    return course


def _refuse_other(sequence: TaskSequence, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    owner = text.partition("\n")[0].removeprefix(HEADER)
    if owner == sequence_id(sequence):
        return
    tree = parse_document(text, str(file)).tree
    before = {name: value for name, value in tree.items() if name not in ("seeds", "output")}
    changes = differences(flat(before), flat(settings_of(sequence)))
    raise UsageError(
        f"{file.parent} holds sequence {owner}, not {sequence_id(sequence)}: {told(changes)}; name another "
        "output.folder, or remove that one"
    )
