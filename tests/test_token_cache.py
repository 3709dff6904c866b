"""Kept tokens are those that were made, of every task; what is out of date or damaged is never read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from task_contract import BACKBONES, ENTRIES

from peftkit import token_cache
from peftkit.config import Run
from peftkit.data.arrays import Column, Table
from peftkit.data.files import read_file
from peftkit.data.rows import Rows
from peftkit.data.sources import Splits
from peftkit.prepare import Prepared, prepare
from peftkit.tasks.base import Encoded, Task


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, save in BACKBONES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(folders[name])
    return folders


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept tokens, where every split is large enough."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MANY", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each split that is encoded anew."""
    from peftkit.tasks.sequence_classification import SequenceClassification

    encode, calls = SequenceClassification.encode, []

    def counting(task: Task, rows: Rows, *arguments: Any) -> Encoded:
        calls.append(len(rows))
        return encode(task, rows, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceClassification, "encode", counting)
    yield calls


def run_of(task: dict[str, Any], backbone: Path, rows: list[dict[str, Any]], folder: Path) -> Run:
    data = str(write_jsonl(folder / "rows.jsonl", rows))
    config = {
        "backbone": {"name": str(backbone)},
        "task": {"data": {"train": data, "dev": data}, "max_length": 24} | task,
        "method": {"kind": "full"},
        "training": {"learning_rate": 1e-3, "max_steps": 6, "evaluate_every": 3},
        "audit": {"overlap": 1.0, "duplicates": 1.0},
        "output": {"folder": str(folder / "run")},
    }
    return Run.model_validate_json(json.dumps(config), strict=True)


def sentiment(backbones: dict[str, Path], folder: Path, count: int = 12) -> Run:
    entry = ENTRIES["sequence_classification/single_label"]
    rows = [{"text": f"a good film {'and again ' * (number % 3)}", "label": str(number % 2)} for number in range(count)]
    return run_of({"kind": "sequence_classification"}, backbones[entry.backbone], rows, folder)


def without(run: Run) -> Run:
    return run.model_copy(update={"output": run.output.model_copy(update={"keep_tokens": False})})


def parts(encoded: Encoded) -> tuple[Any, ...]:
    owners = None if encoded.owners is None else list(encoded.owners)
    return (repr(list(encoded.examples)), encoded.truncated, owners, dict(encoded.dropped), encoded.notes)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_task_has_back_what_it_made(name: str, backbones: dict[str, Path], tmp_path: Path, kept: Path) -> None:
    entry = ENTRIES[name]
    kind, _, part = name.partition("/")
    part_name = {"sequence_classification": "problem", "plain_text": "objective"}.get(kind)
    task = {"kind": kind} | entry.settings | ({part_name: part} if part_name else {})
    run = run_of(task, backbones[entry.backbone], entry.rows(), tmp_path)
    plain = prepare(without(run))
    assert not kept.exists()
    first, second = prepare(run), prepare(run)
    for one in (first, second):
        assert isinstance(one.train.encoded.examples, Table)
        assert parts(one.train.encoded) == parts(plain.train.encoded)
        assert one.train.encoded.lengths == plain.train.encoded.lengths
        assert one.fingerprint == plain.fingerprint
        assert (one.head, one.class_weights, one.notes) == (plain.head, plain.class_weights, plain.notes)
    # the fingerprint of a whole document, which holds all lists at once
    document = [plain.head.labels, plain.train.encoded.examples, plain.dev.encoded.examples]
    assert plain.fingerprint == hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def test_a_training_is_the_same(backbones: dict[str, Path], tmp_path: Path) -> None:
    from peftkit.experiment import train

    entry = ENTRIES["sequence_classification/single_label"]
    run = run_of({"kind": "sequence_classification"}, backbones[entry.backbone], entry.rows(), tmp_path)
    prepare(run)
    losses = []
    for number, one in enumerate((without(run), run)):
        output = one.output.model_copy(update={"folder": str(tmp_path / f"run-{number}")})
        losses.append(train(one.model_copy(update={"output": output})).record.losses)
    assert losses[0] == losses[1]


class TestFound:
    def prepared(self, run: Run, rows: Rows) -> Prepared:
        return prepare(run, Splits(rows, rows, None))

    def test_what_is_the_same_is_encoded_once(
        self, backbones: dict[str, Path], tmp_path: Path, counted: list[int]
    ) -> None:
        run = sentiment(backbones, tmp_path)
        for _ in range(3):
            prepare(run)
        assert counted == [12]  # dev has the same rows

    def test_what_differs_is_not_found(self, backbones: dict[str, Path], tmp_path: Path, counted: list[int]) -> None:
        run = sentiment(backbones, tmp_path)
        rows = read_file(tmp_path / "rows.jsonl")
        self.prepared(run, rows)
        task, backbone = run.task, run.backbone
        longer = run.model_copy(update={"task": task.model_copy(update={"max_length": 7})})
        smaller = run.model_copy(
            update={"backbone": backbone.model_copy(update={"name": str(self.other_words(backbone.name, tmp_path))})}
        )
        changed = [*rows.records[:-1], rows.records[-1] | {"text": "a bad film"}]
        relabelled = [*rows.records[:-1], rows.records[-1] | {"label": "0"}]
        elsewhere = [*rows.places[:-1], 99]
        for asked, given in (
            (longer, rows),
            (smaller, rows),
            (run, rows.take(range(11))),
            (run, rows.take(reversed(range(12)))),
            (run, replace(rows, records=changed)),
            (run, replace(rows, records=relabelled)),
            (run, replace(rows, places=elsewhere)),
            (run, replace(rows, source="other.jsonl")),
        ):
            before = len(counted)
            first = self.prepared(asked, given)
            assert len(counted) == before + 1
            assert parts(self.prepared(asked, given).train.encoded) == parts(first.train.encoded)
            assert parts(prepare(without(asked), Splits(given, given, None)).train.encoded) == parts(
                first.train.encoded
            )
            del counted[before + 1 :]

    def other_words(self, backbone: str, folder: Path) -> Path:
        """The same model, whose tokenizer has two words in each other's place."""
        import shutil

        other = folder / "other-words"
        shutil.copytree(backbone, other)
        text = (other / "tokenizer.json").read_text(encoding="utf-8")
        swapped = text.replace('"good":', '"\0":').replace('"film":', '"good":').replace('"\0":', '"film":')
        assert swapped != text
        (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
        return other

    @pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no entry", "half an entry", "another shape"])
    def test_what_is_damaged_is_made_again(
        self, harm: str, backbones: dict[str, Path], tmp_path: Path, kept: Path, counted: list[int]
    ) -> None:
        run = sentiment(backbones, tmp_path)
        whole = parts(prepare(run).train.encoded)
        (folder,) = (one for one in kept.iterdir() if one.is_dir())
        values, entry = folder / "0.values.npy", folder / token_cache.ENTRY
        content = values.read_bytes()
        if harm == "cut":
            values.write_bytes(content[:-4])
        elif harm == "changed":
            values.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "gone":
            values.unlink()
        elif harm == "no entry":
            entry.unlink()
        elif harm == "half an entry":
            entry.write_text(entry.read_text()[:40])
        else:
            entry.write_text('{"files": {}, "columns": {"input_ids": 3}}')
        assert parts(prepare(run).train.encoded) == whole
        assert parts(prepare(run).train.encoded) == whole
        assert counted == [12, 12]

    def test_several_at_once_encode_once(self, backbones: dict[str, Path], tmp_path: Path, counted: list[int]) -> None:
        run = sentiment(backbones, tmp_path)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(parts(prepare(run).train.encoded))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted == [12]
        assert found == found[:1] * 4


class TestKept:
    def test_few_rows_are_not(
        self, backbones: dict[str, Path], tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(token_cache, "MANY", 13)
        assert isinstance(prepare(sentiment(backbones, tmp_path)).train.encoded.examples, list)
        assert not kept.exists()

    def test_where_nothing_can_be_written_the_run_goes_on(
        self, backbones: dict[str, Path], tmp_path: Path, kept: Path, counted: list[int]
    ) -> None:
        kept.parent.write_text("a file")
        run = sentiment(backbones, tmp_path)
        with pytest.warns(RuntimeWarning, match="tokens are not kept in .*/cache/tokens: "):
            found = prepare(run)
        assert parts(found.train.encoded) == parts(prepare(without(run)).train.encoded)

    def test_a_full_disk_leaves_nothing(
        self, backbones: dict[str, Path], tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("peftkit.data.arrays.np.save", full)
        run = sentiment(backbones, tmp_path)
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            found = prepare(run)
        assert parts(found.train.encoded) == parts(prepare(without(run)).train.encoded)
        assert [one for one in kept.iterdir() if one.suffix != ".lock"] == []

    def test_what_was_not_read_for_long_makes_room(
        self, backbones: dict[str, Path], tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders: list[Path] = []
        for count in (10, 11, 12):
            (tmp_path / str(count)).mkdir()
            prepare(sentiment(backbones, tmp_path / str(count), count))
            new = [one for one in kept.iterdir() if one.is_dir() and one not in folders]
            folders += new
            os.utime(new[0] / token_cache.ENTRY, (count, count))
        prepare(sentiment(backbones, tmp_path / "10", 10))  # read, and so the latest
        size = sum(file.stat().st_size for file in folders[0].iterdir())
        monkeypatch.setattr(token_cache, "MOST", int(2.5 * size))
        (tmp_path / "13").mkdir()
        prepare(sentiment(backbones, tmp_path / "13", 13))
        assert [one.exists() for one in folders] == [True, False, False]
        assert len([one for one in kept.iterdir() if one.is_dir()]) == 2


class TestTable:
    def test_records_come_back_as_they_are(self) -> None:
        chance = random.Random(0)
        records: list[dict[str, Any]] = [
            {
                "ids": [chance.randrange(-5, 50_000) for _ in range(number % 4)],
                "large": [2**40 + number],
                "marks": [chance.random() for _ in range(3)],
                "label": number % 3,
                "score": number / 7,
                "flag": number % 2 == 0,
                "words": ["ä", None, {"b": [1, (2.0,)]}] if number % 2 else "text",
            }
            for number in range(50)
        ]
        table = Table.of(records)
        assert table is not None
        assert repr(list(table)) == repr(records)
        assert repr(table[3:40:7]) == repr(records[3:40:7])
        assert repr(table[-1]) == repr(records[-1])
        assert len(table) == 50
        with pytest.raises(IndexError):
            table[50]
        assert table.columns["ids"].values.dtype == "int32"
        assert table.columns["large"].values.dtype == "int64"

    @pytest.mark.parametrize(
        "records",
        [
            [],
            [{"a": 1}, {"b": 1}],
            [{"a": 1, "b": 2}, {"b": 2, "a": 1}],
            [{"a": object()}],
            [{"a": Path("b")}],
            [{"a": "x"}, {"a": float("nan")}],
        ],
    )
    def test_what_would_come_back_otherwise_is_refused(self, records: list[dict[str, Any]]) -> None:
        assert Table.of(records) is None

    def test_numbers_of_two_types_stay_what_they_are(self) -> None:
        column = Column.of([1, 2.0, True])
        assert column is not None
        assert [type(column.at(index)) for index in range(3)] == [int, float, bool]
