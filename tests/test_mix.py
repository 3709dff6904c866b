"""Several sources as one: how many rows of each, which, and where they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import sentiment_rows, write_jsonl

from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.mix import Mix, Source, counts, missing_files, read_data
from peftkit.data.sources import DataSettings
from peftkit.errors import ConfigError, DataError, UsageError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """`a` of 30 rows, `b` of 10 with other column names, and dev and test of both."""
    made = {}
    for name, count, columns in (("a", 30, ("text", "label")), ("b", 10, ("sentence", "class"))):
        for split, size in (("train", count), ("dev", 4), ("test", 6)):
            rows = [
                {columns[0]: f"{name} {split} {index}", columns[1]: "negative" if index % 2 else "positive"}
                for index in range(size)
            ]
            made[f"{name}_{split}"] = str(write_jsonl(tmp_path / f"{name}_{split}.jsonl", rows))
    return made


RENAME = {"sentence": "text", "class": "label"}


def mix(
    files: dict[str, str], a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, **settings: Any
) -> Mix:
    first = {"train": files["a_train"], "dev": files["a_dev"], "test": files["a_test"]} | (a or {})
    second = {"train": files["b_train"], "rename": RENAME} | (b or {})
    return Mix(mix=(Source(**first), Source(**second)), **settings)


def texts_of(rows: Any) -> Counter[str]:
    return Counter(record["text"] for record in rows.records)


def test_shares_follow_weight_and_temperature() -> None:
    assert counts([30, 10], [1, 1], 1, 40) == [30, 10]
    assert counts([30, 10], [1, 2], 1, 50) == [30, 20]
    # 900^½ : 100^½ = 3 : 1
    assert counts([900, 100], [1, 1], 2, 1000) == [750, 250]
    assert counts([900, 100], [1, 3], 2, 1000) == [500, 500]
    assert counts([900, 100], [1, 1], 1e9, 1000) == [500, 500]
    # largest remainder: 3⅓ each
    assert counts([5, 5, 5], [1, 1, 1], 1, 10) == [4, 3, 3]


def test_a_plain_mix_is_all_rows_once(files: dict[str, str]) -> None:
    splits = read_data(mix(files))
    assert texts_of(splits.train) == Counter([f"a train {i}" for i in range(30)] + [f"b train {i}" for i in range(10)])
    assert {"text", "label"} == set(splits.train.column_names)
    assert splits.train.records != sorted(splits.train.records, key=lambda row: row["text"])
    for index, record in enumerate(splits.train.records):
        name, _, number = record["text"].split()
        assert splits.train.where(index) == f"{files[f'{name}_train']}:{int(number) + 1}"


def test_a_weight_draws_rows_again_and_evenly(files: dict[str, str]) -> None:
    splits = read_data(mix(files, b={"weight": 7.5}, rows=55))
    found = texts_of(splits.train)
    of_b = {text: count for text, count in found.items() if text.startswith("b")}
    # 30 : 75 of 55 rows, by largest remainder
    assert sum(of_b.values()) == 39 and sum(found.values()) == 55
    assert set(of_b.values()) == {3, 4} and len(of_b) == 10
    assert max(count for text, count in found.items() if text.startswith("a")) == 1
    (note,) = splits.notes
    assert note.startswith(
        f"mix of 55 training rows: 16 from the 30 of {files['a_train']} (29.1 %), 39 from the 10 of "
    )
    assert splits.train.records == read_data(mix(files, b={"weight": 7.5}, rows=55)).train.records
    assert splits.train.records != read_data(mix(files, b={"weight": 7.5}, rows=55, seed=1)).train.records


def test_dev_and_test_are_those_of_the_first_source(files: dict[str, str]) -> None:
    splits = read_data(mix(files))
    assert texts_of(splits.dev) == Counter(f"a dev {index}" for index in range(4))
    assert splits.test is not None and texts_of(splits.test) == Counter(f"a test {index}" for index in range(6))


def test_or_those_of_each(files: dict[str, str]) -> None:
    each = {"dev": files["b_dev"], "test": files["b_test"]}
    splits = read_data(mix(files, b=each, evaluate_on="each"))
    assert splits.test is not None
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [40, 8, 12]
    assert splits.dev.where(4) == f"{files['b_dev']}:1" and splits.dev.records[4]["text"] == "b dev 0"
    with pytest.raises(UsageError, match=r"'.*b_train.jsonl' has no test rows and others do; give all, or none"):
        read_data(mix(files, b={"dev": files["b_dev"]}, evaluate_on="each"))


def test_a_missing_dev_is_carved_where_it_is_needed(files: dict[str, str]) -> None:
    splits = read_data(mix(files, a={"dev": None}), label="label")
    assert len(splits.dev) == 3 and len(splits.train) == 37
    assert sum(count for text, count in texts_of(splits.train).items() if text.startswith("b")) == 10
    assert not texts_of(splits.dev) & texts_of(splits.train)
    assert splits.notes[0].startswith("no dev split: 3 of 30 training rows set aside")


def test_limits_of_a_source_and_of_the_mix(files: dict[str, str]) -> None:
    splits = read_data(mix(files, a={"limit": 5}))
    assert sum(count for text, count in texts_of(splits.train).items() if text.startswith("a")) == 5
    splits = read_data(mix(files, limit=8))
    assert [len(splits.train), len(splits.dev)] == [8, 4] and len({text[0] for text in texts_of(splits.train)}) == 2


def test_what_would_be_passed_over_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"mix.1 has dev, but only the first source is evaluated on"):
        mix(files, b={"dev": files["b_dev"]})
    with pytest.raises(UsageError, match=r"mix.1 \(.*b_train.jsonl\) gets none of 40 rows; raise its weight, or rows"):
        read_data(mix(files, b={"weight": 0.001}))


def test_renaming(files: dict[str, str]) -> None:
    swapped = read_data(DataSettings(train=files["a_train"], rename={"text": "label", "label": "text"}))
    assert swapped.train.records[0] == {"label": "a train 0", "text": "positive"}
    with pytest.raises(DataError, match=r"no column 'sentense'; did you mean 'sentence'\?"):
        read_data(DataSettings(train=files["b_train"], rename={"sentense": "text"}))
    with pytest.raises(DataError, match="rename gives two columns the name 'label'"):
        read_data(DataSettings(train=files["a_train"], rename={"text": "label"}))


def test_a_column_that_only_one_split_has_is_renamed_there(tmp_path: Path) -> None:
    train = str(write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}]))
    test = str(write_jsonl(tmp_path / "test.jsonl", [{"text1": "c", "text2": "d"}]))
    found = read_data(DataSettings(train=train, dev=train, test=test, rename={"text1": "text"}))
    assert [record for rows in (found.train, found.test) if rows for record in rows.records] == [
        {"text": "a"},
        {"text": "b"},
        {"text": "c", "text2": "d"},
    ]
    with pytest.raises(DataError, match=r"train.jsonl: no column 'text3'"):
        read_data(DataSettings(train=train, dev=train, test=test, rename={"text3": "text"}))


def test_class_names_are_those_of_all_sources() -> None:
    from peftkit.data.mix import joined
    from peftkit.data.rows import Rows

    parts = [
        Rows(name, [{"label": labels[0]}], [1], {"label": labels})
        for name, labels in (("a", ("x", "y")), ("b", ("y", "z")))
    ]
    assert joined(parts).features == {"label": ("x", "y", "z")}
    assert joined(parts).head(1).where(0) == "a:1" and joined(parts).take([1]).where(0) == "b:1"


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tiny_bert: Path) -> Callable[..., Path]:
    unique = list({row["text"]: row for row in sentiment_rows(120, 3)}.values())

    def write(**data: Any) -> Path:
        parts = {"a": unique[:30], "b": unique[30:60], "dev": unique[60:70], "test": unique[70:80]}
        files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()}
        sources = [
            {"train": files["a"], "dev": files["dev"], "test": files["test"]},
            {"train": files["b"], "weight": 0.5},
        ]
        whole = {
            "backbone": {"name": str(tiny_bert)},
            "task": {"kind": "sequence_classification", "data": {"mix": sources} | data, "max_length": 32},
            "method": {"kind": "head"},
            "training": {"learning_rate": 0.01, "max_steps": 2, "evaluate_every": 2, "batch_size": 8},
            "output": {"folder": str(tmp_path / "run")},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path / "config.yaml"

    return write


def test_a_run_on_a_mix(config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config())]) == 0
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert notes[0].startswith("mix of 60 training rows: 40 from the 30 of ")
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1] and "{}") == {}


def test_files_that_are_not_there_are_told_for_every_source(config: Callable[..., Path], tmp_path: Path) -> None:
    file = config()
    (tmp_path / "b.jsonl").unlink()
    (problem,) = missing_files(load_run(file).task.data)
    assert "b.jsonl: no such file" in problem


def test_wrong_settings_are_told_with_their_place(config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: task.data.temperature: .*greater than or equal to 1"):
        load_run(config(temperature=0.5))
    with pytest.raises(ConfigError, match=r"task.data.evaluate_onn?: unknown key; did you mean 'evaluate_on'"):
        load_run(config(evaluate_onn="each"))
    with pytest.raises(ConfigError, match=r"task.data.mix: "):
        load_run(config(mix=[{"train": "a.jsonl"}]))
