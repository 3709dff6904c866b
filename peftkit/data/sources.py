"""From settings, or from Python, to the three splits of a run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import Field, model_validator

from peftkit.backbones.download import PREFIX
from peftkit.data.carve import carve
from peftkit.data.columns import renamed_tables
from peftkit.data.files import SUFFIXES, Rows, check_file, read_file
from peftkit.data.named import FileSettings, Named, Text
from peftkit.data.tables import Columns
from peftkit.errors import DataError, PeftkitError, UsageError
from peftkit.schema import Section, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

    Table: TypeAlias = Rows | Sequence[Mapping[str, Any]] | Dataset

FORMATS = ("csv", "json", "parquet", "text", "arrow", "xml")  # datasets would read the whole working folder
VARIABLE = re.compile(r"\$\{(\w+)\}")


class DataSettings(Section):
    """Where the rows come from."""

    name: Text | None = None  # "bundled:reuters-r8", a hub id, or a folder; without it the splits are files
    configuration: Text | None = None
    revision: Text | None = None
    train: Named | None = None  # a file; with a name the split, "train" unless given
    dev: Named | None = None  # carved from train unless given
    test: Named | None = None  # bundled sets: "test" when there is one; GLUE's on the hub have hidden labels
    dev_fraction: float = Field(default=0.1, gt=0, lt=1)
    test_fraction: float | None = Field(default=None, gt=0, lt=1)  # of train, carved before dev, where there is no test
    group: Text | None = None  # a column: in carving, rows with the same value in it stay together
    seed: int = Field(default=0, ge=0)  # for the carving only
    rename: dict[Text, Text] = Field(default_factory=dict)  # columns: {name in the data: name in the run}
    limit: int | None = Field(default=None, ge=1)  # the first rows of each split, for trying things out

    @model_validator(mode="after")
    def _belong_together(self) -> DataSettings:
        if self.name is None and self.train is None:
            raise ValueError("train is missing: name a file, or set name to a data set")
        if self.name is not None and any(isinstance(one, FileSettings) for one in (self.train, self.dev, self.test)):
            raise ValueError("with name, train, dev and test are names of splits; leave name out to give files")
        from_hub = self.name is not None and not self.name.startswith(PREFIX)
        for option in ("configuration", "revision"):
            if getattr(self, option) is not None and not from_hub:
                raise ValueError(f"{option} needs name to be a data set of the hub; leave {option} out")
        if self.test is not None and self.test_fraction is not None:
            raise ValueError("test and test_fraction are both set; keep one")
        if self.group is not None and self.dev is not None and self.test_fraction is None:
            raise ValueError("group is for carving, and nothing is carved: dev is given; leave group out")
        return self


@dataclass(frozen=True)
class Splits:
    """The rows of a run, and what was done to get them, in plain words."""

    train: Rows
    dev: Rows
    test: Rows | None
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> Rows:
        """What final figures are computed on: test, or dev where there is no test."""
        return self.dev if self.test is None else self.test


def read_splits(settings: DataSettings, label: str | None = None) -> Splits:
    """The rows that the settings name; a missing dev split is carved from train, stratified by `label`."""
    return _splits(read_tables(settings), settings, label)


def read_tables(settings: DataSettings) -> list[Rows | None]:
    """Train, dev and test as they are in the files or the data set."""
    bundled = settings.name is not None and settings.name.startswith(PREFIX)
    read = _read_files if settings.name is None else _read_bundled if bundled else _load_all
    return renamed_tables(read(settings), settings.rename)


def splits_from(
    train: Table,
    dev: Table | None = None,
    test: Table | None = None,
    *,
    label: str | None = None,
    dev_fraction: float = 0.1,
    test_fraction: float | None = None,
    group: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Splits:
    """The same from Python: each split a list of dicts, a `datasets.Dataset`, or what `read_file` gave."""
    settings = DataSettings(
        train="train",
        dev_fraction=dev_fraction,
        test_fraction=test_fraction,
        group=group,
        seed=seed,
        limit=limit,
    )
    tables = {"train": train, "dev": dev, "test": test}
    return _splits([_rows_of(table, name) for name, table in tables.items()], settings, label)


def missing_files(settings: DataSettings | None) -> list[str]:
    """What `read_splits` would miss on this machine: variables, files and folders that are not there."""
    if settings is None:
        return ["task.data: the rows must be given in Python"]
    find: Callable[[Any], Path | str] = _folder_or_id if settings.name else _named_file
    bundled = settings.name is not None and settings.name.startswith(PREFIX)
    named = [settings.name] if settings.name else [settings.train, settings.dev, settings.test]
    problems = []
    for value in filter(None, [] if bundled else named):
        try:
            find(value)
        except PeftkitError as problem:
            problems.append(str(problem))
    return problems


def _expand(value: str) -> str:
    """`value` with its `${NAME}`s filled in."""
    for match in VARIABLE.finditer(value):
        if not os.environ.get(match[1]):
            rest = value[match.end() :].lstrip("/")
            held = f"the folder that holds {rest}" if rest and not match.start() else f"its part of '{value}'"
            raise UsageError(f"{match[1]} is not set: export it as {held}")
    return VARIABLE.sub(lambda match: os.environ[match[1]], value)


def _named_file(file: str | FileSettings) -> Path:
    path = Path(_expand(str(file)))
    check_file(path, str(file), file.format if isinstance(file, FileSettings) else None)
    return path


def _read_files(settings: DataSettings) -> list[Rows | None]:
    return [_read_named(file) if file else None for file in (settings.train, settings.dev, settings.test)]


def _read_named(file: str | FileSettings) -> Rows:
    odd = file if isinstance(file, FileSettings) else FileSettings(file=file)
    columns = Columns(odd.columns, odd.ignore_extra)
    return read_file(_named_file(file), odd.file, odd.format, columns)


def _split_names(settings: DataSettings) -> list[str | None]:
    """What a data set with a name calls its splits."""
    return [None if one is None else str(one) for one in (settings.train, settings.dev, settings.test)]


def _read_bundled(settings: DataSettings) -> list[Rows | None]:
    from peftkit.backbones.bundled import bundle_named, fetch

    name = str(settings.name).removeprefix(PREFIX)
    if bundle_named(name).kind != "dataset":
        raise UsageError(f"{settings.name} is a backbone, not data; name it under the backbone")
    folder = fetch(name, progress=sys.stderr.isatty())
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    train, dev, test = _split_names(settings)
    wanted = (train or "train", dev, test or ("test" if "test" in files else None))
    for split in filter(None, wanted):
        if split not in files:
            raise UsageError(f"{settings.name} has no split '{split}'{did_you_mean(split, files)}")
    names = {split: f"{settings.name}/{files[split].name}" for split in wanted if split}
    return [read_file(files[split], names[split]) if split else None for split in wanted]


def _load_all(settings: DataSettings) -> list[Rows | None]:
    name = _folder_or_id(str(settings.name))
    if settings.revision and Path(name).is_dir():
        raise UsageError(f"{settings.name} is a folder and has no revisions; leave revision out")
    train, *others = _split_names(settings)
    splits = (train or "train", *others)
    return [_load(name, settings, split) if split else None for split in splits]


def _folder_or_id(name: str) -> str:
    place = _expand(name)
    if Path(place).is_file() or place in FORMATS:
        raise UsageError(f"{name} is a file or a file format; give files as train, dev and test, without name")
    is_path = place.startswith(("/", ".")) or place.count("/") > 1
    if is_path and not Path(place).is_dir():
        raise UsageError(f"{name}: no such folder; check the path (a hub id looks like 'owner/name')")
    return place


def _load(name: str, settings: DataSettings, split: str) -> Rows:
    from datasets import disable_progress_bars, load_dataset

    source = "/".join(filter(None, (settings.name, settings.configuration))) + f"[{split}]"
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        table = load_dataset(name, settings.configuration, split=split, revision=settings.revision)
    except Exception as problem:  # whatever the network, the hub and the readers of datasets raise
        raise _load_error(source, problem) from problem
    return _rows_of_dataset(table, source)


def _load_error(source: str, problem: Exception) -> PeftkitError:
    """One line: what datasets says, and the mend."""
    generating = type(problem).__name__ == "DatasetGenerationError"  # which only says that something failed
    root = problem.__cause__ if generating and problem.__cause__ else problem
    cause = (str(root).strip() or type(root).__name__).splitlines()[0].rstrip(".")[:300]
    if isinstance(problem, ConnectionError):
        return DataError(f"{source}: {cause}; go online (once is enough), or give the splits as files")
    if isinstance(problem, ValueError | FileNotFoundError):
        return UsageError(f"{source}: {cause}; check name, configuration and split (a folder: its path)")
    return DataError(f"{source}: datasets cannot read it: {cause}; mend it, or give the splits as files")


def _rows_of(table: Table | None, name: str) -> Rows | None:
    """What a Python user handed over, as rows."""
    if table is None or isinstance(table, Rows):
        return table
    if isinstance(table, list | tuple):
        _check_dicts(table, name)
        return _numbered(name, [dict(record) for record in table])
    from datasets import Dataset

    if isinstance(table, Dataset):
        return _rows_of_dataset(table, name)
    kind = f"{name} is a {type(table).__name__}"
    raise UsageError(f"{kind}; give a list of dicts, a datasets.Dataset, or read_file(...)")


def _check_dicts(records: Sequence[object], name: str) -> None:
    for row, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise DataError(f"{name} row {row} is a {type(record).__name__}; each row is a dict")


def _rows_of_dataset(table: Dataset, source: str) -> Rows:
    """Its rows, with class names in place of class numbers."""
    features = {column: names for column in table.features if (names := _class_names(table.features[column]))}
    rows = replace(_numbered(source, table.to_list()), features=features)
    for index, record in enumerate(rows.records):
        for column, names in features.items():
            record[column] = _named(record[column], names, f"{rows.where(index)}: '{column}'")
    return rows


def _class_names(feature: Any) -> tuple[str, ...]:
    """The names of a class column, or of a column that holds lists of classes."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", feature)
    return tuple(inner.names or ()) if isinstance(inner, ClassLabel) else ()


def _named(value: Any, names: tuple[str, ...], where: str) -> Any:
    if isinstance(value, list):
        return [_named(one, names, where) for one in value]
    if value is None or not 0 <= value < len(names):
        raise DataError(f"{where} is {value}, a hidden label; choose a split that has its labels")
    return names[value]


def _numbered(source: str, records: list[dict[str, Any]]) -> Rows:
    if not records:
        raise DataError(f"{source}: no rows; leave the split out, or give it some")
    return Rows(source, records, range(1, len(records) + 1), by_line=False)


def _splits(rows: Sequence[Rows | None], settings: DataSettings, label: str | None) -> Splits:
    """The splits; those that are missing are carved from train, and all are shortened to the limit."""
    train, dev, test = rows
    if train is None:
        raise UsageError("train is missing; give its rows")
    notes = []
    if settings.test_fraction is not None:
        if test is not None:
            raise UsageError(f"test_fraction: there is a test split ({test.source}) already; leave test_fraction out")
        train, test, note = carve(train, settings.test_fraction, settings.seed, label, settings.group, "test")
        notes.append(note)
    if dev is None:
        train, dev, note = carve(train, settings.dev_fraction, settings.seed, label, settings.group)
        notes.append(note)
    if limit := settings.limit:
        notes.append(f"limit: at most the first {limit:,} rows of each split")
        train, dev, test = train.head(limit), dev.head(limit), test and test.head(limit)
    return Splits(train, dev, test, tuple(notes))
