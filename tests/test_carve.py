"""Splits that are carved: whole groups, test beside dev, and the same rows every time."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from peftkit.data.carve import carve
from peftkit.data.files import Rows
from peftkit.data.sources import DataSettings, Splits, read_splits, splits_from
from peftkit.errors import DataError, UsageError


def grouped(*sizes: int) -> list[dict[str, Any]]:
    """Rows of groups of these sizes, in mixed order; `n` tells them apart."""
    rows = [
        {"title": f"article {group}", "label": "ab"[n % 2]} for group, size in enumerate(sizes) for n in range(size)
    ]
    random.Random(0).shuffle(rows)
    return [row | {"n": number} for number, row in enumerate(rows)]


def rows_of(records: list[dict[str, Any]]) -> Rows:
    return Rows("train.jsonl", records, range(1, len(records) + 1))


def titles(rows: Rows | None) -> set[str]:
    assert rows is not None
    return {record["title"] for record in rows.records}


def numbers(*splits: Rows | None) -> list[int]:
    return [record["n"] for rows in splits if rows is not None for record in rows.records]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_groups_stay_whole(seed: int, fraction: float) -> None:
    sizes = random.Random(seed).choices(range(1, 9), k=12)
    given = rows_of(grouped(*sizes))
    train, dev, note = carve(given, fraction, seed, "label", "title")
    assert titles(train).isdisjoint(titles(dev))
    assert sorted(numbers(train, dev)) == list(range(sum(sizes)))
    assert len(train) and len(dev)
    # no group that was left could bring it nearer to what was asked for
    wanted = max(1, int(sum(sizes) * fraction + 0.5))
    missing = wanted - len(dev)
    left = Counter(record["title"] for record in train.records)
    assert len(left) == 1 or all(abs(missing - size) >= abs(missing) or missing < 0 for size in left.values())
    share = f"{len(titles(dev))} of 12 groups of 'title' whole, seed {seed}"
    assert note == f"no dev split: {len(dev)} of {sum(sizes)} training rows set aside ({100 * fraction:g} %, {share})"
    assert carve(given, fraction, seed, "label", "title")[1].places == dev.places


def test_seeds_choose_other_groups() -> None:
    given = rows_of(grouped(*[3] * 20))
    assert len({frozenset(titles(carve(given, 0.2, seed, None, "title")[1])) for seed in range(5)}) > 1


def test_two_groups_are_one_each() -> None:
    train, dev, _ = carve(rows_of(grouped(9, 1)), 0.5, 0, None, "title")
    assert len(titles(train)) == len(titles(dev)) == 1


def test_groups_are_told_by_any_value() -> None:
    given = rows_of([{"n": n, "title": [n // 4, None]} for n in range(12)])
    train, dev, _ = carve(given, 0.3, 0, None, "title")
    assert {n // 4 for n in numbers(train)}.isdisjoint({n // 4 for n in numbers(dev)})


def test_one_group_cannot_be_divided() -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl: 'title' is the same in all rows, so no group of them can be set"
    ):
        carve(rows_of(grouped(9)), 0.5, 0, None, "title")
    with pytest.raises(DataError, match=r"no column 'titel'; did you mean 'title'\?"):
        carve(rows_of(grouped(9, 2)), 0.5, 0, None, "titel")


def read(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Splits:
    return read_splits(DataSettings(train=str(write_jsonl(folder / "train.jsonl", rows)), **settings), label="label")


def test_test_is_carved_before_dev(tmp_path: Path) -> None:
    splits = read(tmp_path, grouped(*[5] * 20), group="title", test_fraction=0.2, dev_fraction=0.25)
    parts = splits.train, splits.dev, splits.test
    assert [len(titles(one)) for one in parts] == [12, 4, 4]
    assert sorted(numbers(*parts)) == list(range(100))
    assert splits.held_out is splits.test
    assert [note.partition(" of ")[0] for note in splits.notes] == [
        "no test split: 20",
        "no dev split: 20",
    ]


def test_without_groups_test_is_stratified_as_dev_is(tmp_path: Path) -> None:
    splits = read(tmp_path, grouped(60, 40), test_fraction=0.2)
    assert splits.test is not None
    assert Counter(record["label"] for record in splits.test.records) == {"a": 10, "b": 10}
    assert "stratified by 'label'" in splits.notes[0]


def test_a_given_dev_stays_as_it_is() -> None:
    dev = [{"n": -1, "title": "dev", "label": "a"}]
    splits = splits_from(grouped(*[4] * 5), dev, test_fraction=0.4, group="title")
    assert splits.dev.records == dev
    assert len(titles(splits.test)) == 2
    assert len(splits.notes) == 1


def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="test and test_fraction are both set; keep one"):
        DataSettings(train="a.csv", test="b.csv", test_fraction=0.1)
    with pytest.raises(ValueError, match="group is for carving, and nothing is carved: dev is given"):
        DataSettings(train="a.csv", dev="b.csv", group="title")
    rows = grouped(3, 3)
    with pytest.raises(UsageError, match=r"test_fraction: there is a test split \(test\) already"):
        splits_from(rows, rows, rows, test_fraction=0.1)
