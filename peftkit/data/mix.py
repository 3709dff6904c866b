"""Several data sources as one, each with a weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from peftkit.data import sources
from peftkit.data.rows import Rows
from peftkit.data.sources import DataSettings, Splits, read_splits, read_tables
from peftkit.errors import UsageError
from peftkit.schema import Section


class Source(DataSettings):
    """One of the sources of a mix; `rename` makes its columns fit the others'."""

    weight: float = Field(default=1.0, gt=0)


class Mix(Section):
    """Training rows from several sources.

    Source i, of n_i training rows, is Σ_j n_j · share_i rows of the mix, where share_i is in proportion to
    weight_i · n_i^(1 / temperature). With weights and temperature 1 the mix is all sources one after the other; a
    greater temperature evens out their sizes. Rows are drawn without replacement until all of a source are used up,
    and then from all of them again, so that no row comes up more than once more than another.
    """

    mix: Annotated[tuple[Source, ...], Field(min_length=2)]
    temperature: float = Field(default=1.0, ge=1)
    rows: int | None = Field(default=None, ge=1)
    """Rows of the mix; default: as many as the sources have."""
    evaluate_on: Literal["first", "each"] = "first"
    """Whose dev and test rows are the run's: those of the first source, or those of all, one after the other."""
    seed: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=1)
    """The first rows of each split of the mix, for trying things out."""

    @model_validator(mode="after")
    def _nothing_is_passed_over(self) -> Mix:
        for index, source in enumerate(self.mix[1:] if self.evaluate_on == "first" else (), 1):
            given = [name for name in ("dev", "test", "test_fraction") if getattr(source, name) is not None]
            if given:
                raise ValueError(
                    f"mix.{index} has {given[0]}, but only the first source is evaluated on; leave it out, or set "
                    "evaluate_on: each"
                )
        return self


def _is_mix(value: Any) -> str:
    return "(mix)" if isinstance(value, Mix) or (isinstance(value, dict) and "mix" in value) else "(rows)"


AnyData = Annotated[Annotated[DataSettings, Tag("(rows)")] | Annotated[Mix, Tag("(mix)")], Discriminator(_is_mix)]


@dataclass(frozen=True)
class MixedRows(Rows):
    """Rows of several sources. `places` are positions in `origins`."""

    origins: tuple[str, ...] = ()

    def where(self, index: int) -> str:
        return self.origins[self.places[index]]


def read_data(data: DataSettings | Mix, label: str | None = None) -> Splits:
    """The rows that a configuration names; `label` as in `read_splits`.

    Raises:
        UsageError: a source of a mix that gets no row, or has no test rows where others have some.
    """
    if isinstance(data, DataSettings):
        return read_splits(data, label)
    each = [_splits(source, data, label, first=not index) for index, source in enumerate(data.mix)]
    train, note = _mixed([one.train for one in each], data)
    evaluated = each if data.evaluate_on == "each" else each[:1]
    dev = joined([one.dev for one in evaluated])
    tests = [one.test for one in evaluated if one.test is not None]
    if tests and len(tests) < len(evaluated):
        lacking = next(one.train.source for one in evaluated if one.test is None)
        raise UsageError(f"evaluate_on: each, but '{lacking}' has no test rows and others do; give all, or none")
    test = joined(tests) if tests else None
    notes = [*(note for one in each for note in one.notes), note]
    if limit := data.limit:
        notes.append(f"limit: at most the first {limit:,} rows of each split")
        train, dev, test = train.head(limit), dev.head(limit), test and test.head(limit)
    return Splits(train, dev, test, tuple(notes))


def missing_files(data: DataSettings | Mix | None) -> list[str]:
    """What `read_data` would miss on this machine."""
    if isinstance(data, Mix):
        return [problem for source in data.mix for problem in sources.missing_files(source)]
    return sources.missing_files(data)


def counts(sizes: Sequence[int], weights: Sequence[float], temperature: float, total: int) -> list[int]:
    """How many rows of each source make up `total`: in proportion to weight · size^(1 / temperature), by largest
    remainder."""
    parts = [weight * size ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    exact = [total * part / sum(parts) for part in parts]
    whole = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows, part by part; class names are those of all parts in order of appearance."""
    if len(parts) == 1:
        return parts[0]
    features: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for column, names in part.features.items():
            features[column] = tuple(dict.fromkeys((*features.get(column, ()), *names)))
    records = [record for part in parts for record in part.records]
    origins = tuple(part.where(index) for part in parts for index in range(len(part)))
    source = " + ".join(dict.fromkeys(part.source for part in parts))
    return MixedRows(source, records, range(len(records)), features, by_line=False, origins=origins)


def _splits(source: Source, data: Mix, label: str | None, first: bool) -> Splits:
    """The splits of one source; one that is not evaluated on keeps all its rows for training."""
    if first or data.evaluate_on == "each":
        return read_splits(source, label)
    train = read_tables(source)[0]
    assert train is not None
    chosen = train.head(source.limit) if source.limit else train
    return Splits(chosen, chosen, None)


def _mixed(trains: Sequence[Rows], data: Mix) -> tuple[Rows, str]:
    """The mix in an order of its own, and what was done in plain words."""
    sizes = [len(train) for train in trains]
    total = data.rows or sum(sizes)
    drawn = counts(sizes, [source.weight for source in data.mix], data.temperature, total)
    parts, told = [], []
    for index, (train, count) in enumerate(zip(trains, drawn, strict=True)):
        if not count:
            raise UsageError(f"mix.{index} ({train.source}) gets none of {total:,} rows; raise its weight, or rows")
        parts.append(train.take(_drawn(len(train), count, random.Random(f"{data.seed}/{index}"))))
        told.append(f"{count:,} from the {len(train):,} of {train.source} ({100 * count / total:.1f} %)")
    mixed = joined(parts)
    order = list(range(len(mixed)))
    random.Random(data.seed).shuffle(order)
    return mixed.take(order), f"mix of {total:,} training rows: {', '.join(told)}, seed {data.seed}"


def _drawn(size: int, count: int, chance: random.Random) -> list[int]:
    """`count` of `size` rows, each ⌊count / size⌋ or one more times."""
    return [*range(size)] * (count // size) + sorted(chance.sample(range(size), count % size))
