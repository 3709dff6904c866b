"""From settings to splits: files, folders, bundled sets, the hub, Python objects, and the carving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from pydantic import ValidationError

from peftkit.backbones import bundled
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings, Splits, missing_files, read_splits, splits_from
from peftkit.errors import DataError, PeftkitError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the caches of datasets go there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    yield
    datasets.enable_progress_bars()


def write_csv(path: Path | str, labels: str) -> None:
    """A file with one row for each letter of `labels`."""
    rows = [f"text {i},{label}\n" for i, label in enumerate(labels)]
    Path(path).write_text("text,label\n" + "".join(rows), encoding="utf-8")


def texts(rows: Rows | None) -> list[str]:
    assert rows is not None
    return [record["text"] for record in rows.records]


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "train is missing: name a file"),
            ({"dev": "dev.csv"}, "train is missing"),
            ({"train": "a.csv", "configuration": "sst2"}, "configuration needs name to be a data set of the hub"),
            ({"train": "a.csv", "revision": "main"}, "revision needs name"),
            ({"name": "bundled:reuters-r8", "revision": "main"}, "revision needs name"),
            ({"train": "a.csv", "dev_fraction": 0}, "dev_fraction"),
            ({"train": "a.csv", "dev_fraction": 1}, "dev_fraction"),
            ({"train": "a.csv", "limit": 0}, "limit"),
            ({"train": ""}, "train"),
            ({"train": "a.csv", "tset": "b.csv"}, "tset"),
        ],
    )
    def test_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            DataSettings(**given)

    def test_hub_name_may_have_configuration_and_revision(self) -> None:
        settings = DataSettings(name="glue", configuration="sst2", revision="main")
        assert (settings.train, settings.dev, settings.test) == (None, None, None)


class TestFiles:
    def test_three_files(self) -> None:
        for name, labels in (("a.csv", "xyx"), ("b.csv", "xy"), ("c.csv", "y")):
            write_csv(name, labels)
        splits = read_splits(DataSettings(train="a.csv", dev="b.csv", test="c.csv"), label="label")
        assert splits.test is not None
        assert [len(splits.train), len(splits.dev), len(splits.test)] == [3, 2, 1]
        assert splits.notes == ()

    def test_variable_in_the_name(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "elsewhere").mkdir()
        write_csv("elsewhere/a.csv", "xy")
        monkeypatch.setenv("SOME_DATA", str(folder / "elsewhere"))
        file = "${SOME_DATA}/a.csv"
        splits = read_splits(DataSettings(train=file, dev=file))
        assert splits.train.where(0) == "${SOME_DATA}/a.csv:2"

    @pytest.mark.parametrize("value", [None, ""])
    def test_unset_variable(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        monkeypatch.delenv("PEFTKIT_DATA", raising=False)
        if value is not None:
            monkeypatch.setenv("PEFTKIT_DATA", value)
        with pytest.raises(UsageError) as caught:
            read_splits(DataSettings(train="${PEFTKIT_DATA}/sst2/train.tsv"))
        assert str(caught.value) == "PEFTKIT_DATA is not set: export it as the folder that holds sst2/train.tsv"

    def test_unset_variable_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LANGUAGE_CODE", raising=False)
        with pytest.raises(UsageError, match=r"^LANGUAGE_CODE is not set: export it as its part of 'a/\$\{LANG"):
            read_splits(DataSettings(train="a/${LANGUAGE_CODE}.tsv"))

    def test_missing_files_lists_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PEFTKIT_DATA", raising=False)
        write_csv("a.csv", "xy")
        settings = DataSettings(train="a.csv", dev="b.csv", test="${PEFTKIT_DATA}/c.csv")
        missing, unset = missing_files(settings)
        assert missing.startswith("b.csv: no such file in ")
        assert unset == "PEFTKIT_DATA is not set: export it as the folder that holds c.csv"

    def test_missing_files_reads_nothing(self) -> None:
        Path("a.csv").write_bytes(b"\xff\0 no csv")
        assert missing_files(DataSettings(train="a.csv")) == []
        assert missing_files(DataSettings(name="bundled:reuters-r8")) == []
        assert missing_files(DataSettings(name="glue", configuration="sst2")) == []

    def test_missing_folder(self) -> None:
        assert missing_files(DataSettings(name="./none")) == [
            "./none: no such folder; check the path (a hub id looks like 'owner/name')"
        ]

    def test_limit(self) -> None:
        write_csv("a.csv", "xyxyxyxy")
        splits = read_splits(DataSettings(train="a.csv", dev="a.csv", test="a.csv", limit=3))
        assert texts(splits.train) == texts(splits.dev) == texts(splits.test) == ["text 0", "text 1", "text 2"]
        assert splits.notes == ("limit: at most the first 3 rows of each split",)


def carved(labels: str, label: str | None = "label", **settings: Any) -> Splits:
    write_csv("train.csv", labels)
    return read_splits(DataSettings(train="train.csv", **settings), label)


class TestCarving:
    def test_parts_are_disjoint_complete_and_in_order(self) -> None:
        splits = carved("xyz" * 100)
        everything = texts(read_file("train.csv"))
        kept, aside = texts(splits.train), texts(splits.dev)
        assert sorted(kept + aside) == sorted(everything)
        assert kept == [text for text in everything if text in set(kept)]
        assert aside == [text for text in everything if text in set(aside)]
        assert list(splits.dev.places) == sorted(splits.dev.places)

    def test_every_class_gives_its_share(self) -> None:
        splits = carved("a" * 500 + "b" * 300 + "c" * 150 + "d" * 50)
        assert Counter(record["label"] for record in splits.dev.records) == {"a": 50, "b": 30, "c": 15, "d": 5}

    def test_note_says_what_was_done(self) -> None:
        splits = carved("a" * 5000 + "b" * 485, seed=3)
        assert splits.notes == (
            "no dev split: 549 of 5,485 training rows set aside (10 %, stratified by 'label', seed 3)",
        )
        assert carved("ab" * 10, None, dev_fraction=0.25).notes == (
            "no dev split: 5 of 20 training rows set aside (25 %, seed 0)",
        )

    def test_same_seed_same_rows(self) -> None:
        first, again, other = (carved("xy" * 50, seed=seed) for seed in (1, 1, 2))
        assert texts(first.dev) == texts(again.dev) != texts(other.dev)

    @pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.99])
    def test_every_class_stays_in_train(self, fraction: float) -> None:
        splits = carved("a" * 90 + "bb" + "ccc" + "d" + "e", dev_fraction=fraction)
        assert {record["label"] for record in splits.train.records} == set("abcde")
        assert not {"d", "e"} & {record["label"] for record in splits.dev.records}

    def test_without_label_the_share_is_exact(self) -> None:
        assert len(carved("abcdefghij", None, dev_fraction=0.2).dev) == 2

    def test_at_least_one_row(self) -> None:
        assert len(carved("aaa", dev_fraction=0.01).dev) == 1

    @pytest.mark.parametrize(("labels", "label"), [("x", None), ("xy", "label"), ("abcdef", "label")])
    def test_too_few_rows(self, labels: str, label: str | None) -> None:
        with pytest.raises(DataError, match=r"^train\.csv: \d training rows of \d classes are too few"):
            carved(labels, label)

    def test_unknown_label_column(self) -> None:
        with pytest.raises(DataError, match=r"^train\.csv: no column 'labl'; did you mean 'label'\?"):
            carved("xyxy", "labl")

    @pytest.mark.parametrize("labels", [[0.5, 1.5], [["a"], ["b"]], [None, "a"]])
    def test_no_strata_from_scores_and_lists(self, labels: list[Any]) -> None:
        records = [{"text": str(i), "label": labels[i % 2]} for i in range(20)]
        assert splits_from(records, label="label").notes[0].endswith("(10 %, seed 0)")

    def test_limit_comes_after_carving(self) -> None:
        whole, short = carved("xy" * 50), carved("xy" * 50, limit=4)
        assert texts(short.train) == texts(whole.train)[:4]
        assert texts(short.dev) == texts(whole.dev)[:4]
        assert len(short.notes) == 2


LABELLED = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})


def labelled(count: int, features: Features = LABELLED) -> Dataset:
    columns = {"text": [f"text {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    return Dataset.from_dict(columns, features=features)


class TestLocalFolder:
    @pytest.fixture
    def reviews(self, folder: Path) -> str:
        (folder / "reviews" / "data").mkdir(parents=True)
        for split, count in (("train", 20), ("validation", 6), ("test", 4)):
            labelled(count).to_parquet(f"reviews/data/{split}-00000-of-00001.parquet")
        return str(folder / "reviews")

    def test_class_numbers_become_names(self, reviews: str) -> None:
        splits = read_splits(DataSettings(name=reviews, dev="validation", test="test"), "label")
        assert splits.test is not None
        assert [len(splits.train), len(splits.dev), len(splits.test)] == [20, 6, 4]
        assert splits.train.records[:2] == [
            {"text": "text 0", "label": "negative"},
            {"text": "text 1", "label": "positive"},
        ]
        assert splits.train.features == {"label": ("negative", "positive")}
        assert splits.dev.where(5) == f"{reviews}[validation] row 6"

    def test_test_split_only_when_asked_for(self, reviews: str) -> None:
        splits = read_splits(DataSettings(name=reviews), "label")
        assert splits.test is None
        assert Counter(record["label"] for record in splits.dev.records) == {"negative": 1, "positive": 1}
        assert splits.dev.features == {"label": ("negative", "positive")}

    def test_names_from_the_card(self, folder: Path) -> None:
        write_csv("train.csv", "0110")
        card = """---
configs:
- config_name: short
  data_files: [{split: train, path: train.csv}]
dataset_info:
- config_name: short
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label:
        names: {'0': 'no', '1': 'yes'}
---
"""
        Path("README.md").write_text(card, encoding="utf-8")
        splits = read_splits(DataSettings(name=str(folder), configuration="short", dev="train"))
        assert [record["label"] for record in splits.train.records] == ["no", "yes", "yes", "no"]
        assert splits.train.where(0) == f"{folder}/short[train] row 1"

    def test_saved_dataset_dict(self) -> None:
        DatasetDict(train=labelled(20), test=labelled(4)).save_to_disk("saved")
        assert len(read_splits(DataSettings(name="./saved", test="test")).train) == 18

    def test_unknown_split_and_configuration(self, reviews: str) -> None:
        with pytest.raises(UsageError, match=r"reviews\[trian\]: Unknown split \"trian\". Should be one of \['train"):
            read_splits(DataSettings(name=reviews, train="trian"))
        with pytest.raises(UsageError, match=r"reviews/x\[train\]: BuilderConfig 'x' not found. Available: \["):
            read_splits(DataSettings(name=reviews, configuration="x"))

    def test_folder_without_data(self, folder: Path) -> None:
        (folder / "empty").mkdir()
        with pytest.raises(UsageError, match=r"^\./empty\[train\]: .*doesn't contain any data files; check name"):
            read_splits(DataSettings(name="./empty"))

    def test_broken_file_in_the_folder(self, folder: Path) -> None:
        (folder / "broken").mkdir()
        Path("broken/train.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
        with pytest.raises(DataError, match=r"^\./broken\[train\]: datasets cannot read it: ") as caught:
            read_splits(DataSettings(name="./broken"))
        assert "\n" not in str(caught.value)

    def test_revision_of_a_folder(self, reviews: str) -> None:
        with pytest.raises(UsageError, match="is a folder and has no revisions"):
            read_splits(DataSettings(name=reviews, revision="main"))

    @pytest.mark.parametrize("name", ["train.csv", "csv"])
    def test_file_or_format_as_name(self, name: str) -> None:
        write_csv("train.csv", "xy")
        with pytest.raises(UsageError, match=f"^{name} is a file or a file format; give files as train"):
            read_splits(DataSettings(name=name))

    def test_no_progress_bars_without_a_terminal(self, reviews: str, capfd: pytest.CaptureFixture[str]) -> None:
        datasets.enable_progress_bars()
        capfd.readouterr()
        read_splits(DataSettings(name=reviews))
        assert capfd.readouterr().err == ""


class TestHubOutOfReach:
    def read(self, name: str, folder: Path, **settings: str) -> dict[str, str]:
        code = f"""
import json
from peftkit.data.sources import DataSettings, read_splits
from peftkit.errors import PeftkitError
try:
    read_splits(DataSettings(name={name!r}, **{settings!r}))
except PeftkitError as problem:
    print(json.dumps({{"kind": type(problem).__name__, "message": str(problem)}}))
"""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def test_one_clear_error(self, folder: Path) -> None:
        error = self.read("glue", folder, configuration="sst2")
        assert error["kind"] == "DataError"
        assert error["message"] == (
            "glue/sst2[train]: Couldn't reach 'glue' on the Hub (OfflineModeIsEnabled); "
            "go online (once is enough), or give the splits as files"
        )


class TestLoadErrors:
    """What only a reachable hub raises."""

    @pytest.mark.parametrize(
        ("problem", "kind", "message"),
        [
            (
                datasets.exceptions.DatasetNotFoundError("Dataset 'gleu' doesn't exist on the Hub.\nMore"),
                UsageError,
                "gleu[train]: Dataset 'gleu' doesn't exist on the Hub; check name, configuration and split",
            ),
            (
                RuntimeError("Dataset scripts are no longer supported, but found gleu.py"),
                DataError,
                "gleu[train]: datasets cannot read it: Dataset scripts are no longer supported",
            ),
            (OSError(), DataError, "gleu[train]: datasets cannot read it: OSError; mend it"),
        ],
    )
    def test_one_line_with_the_mend(
        self, monkeypatch: pytest.MonkeyPatch, problem: Exception, kind: type[PeftkitError], message: str
    ) -> None:
        def fail(*_: Any, **options: Any) -> None:
            assert "trust_remote_code" not in options
            raise problem

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(kind) as caught:
            read_splits(DataSettings(name="gleu"))
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


class TestBundled:
    @pytest.fixture(autouse=True)
    def bundle(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A small bundle in place of the downloaded one."""
        place = folder / "bundle"
        place.mkdir()
        header = "Category\tText\nd\tstring\nclass\t\n"
        rows = "".join(f"{'acq' if i % 2 else 'earn'}\ttext {i}\n" for i in range(40))
        (place / "train.tab").write_text(header + rows, encoding="utf-8")
        (place / "test.tab").write_text(header + "earn\ttext\n", encoding="utf-8")
        (place / "LICENSE.txt").write_text("free", encoding="utf-8")
        kinds = {"reuters-r8": "dataset", "gpt": "backbone"}
        monkeypatch.setattr(bundled, "bundle_named", lambda name: SimpleNamespace(kind=kinds[name]))
        monkeypatch.setattr(bundled, "fetch", lambda name, progress=True: place)
        return place

    def test_train_and_test_by_default(self) -> None:
        splits = read_splits(DataSettings(name="bundled:reuters-r8"), "Category")
        assert splits.test is not None
        assert [len(splits.train), len(splits.dev), len(splits.test)] == [36, 4, 1]
        assert splits.test.where(0) == "bundled:reuters-r8/test.tab:4"
        assert "stratified by 'Category'" in splits.notes[0]

    def test_splits_by_name(self) -> None:
        settings = DataSettings(name="bundled:reuters-r8", train="test", dev="train", test="test")
        assert len(read_splits(settings).dev) == 40

    def test_no_test_split_is_no_error(self, bundle: Path) -> None:
        (bundle / "test.tab").unlink()
        assert read_splits(DataSettings(name="bundled:reuters-r8")).test is None

    @pytest.mark.parametrize("role", ["train", "dev", "test"])
    def test_unknown_split(self, role: str) -> None:
        settings = DataSettings(**{"name": "bundled:reuters-r8", role: "tets"})
        with pytest.raises(UsageError, match=r"^bundled:reuters-r8 has no split 'tets'; did you mean 'test'\?"):
            read_splits(settings)

    def test_backbone_as_data(self) -> None:
        with pytest.raises(UsageError, match=r"^bundled:gpt is a backbone, not data"):
            read_splits(DataSettings(name="bundled:gpt"))


class TestFromPython:
    def test_lists_of_dicts(self) -> None:
        records = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
        splits = splits_from(records, test=records[:3], label="label", seed=5, limit=2)
        assert splits.test is not None
        assert [len(splits.train), len(splits.dev), len(splits.test)] == [2, 2, 2]
        assert splits.test.where(1) == "test row 2"
        assert "stratified by 'label', seed 5" in splits.notes[0]

    def test_same_carving_as_for_files(self) -> None:
        splits = carved("aab" * 20)
        again = splits_from(read_file("train.csv").records, label="label")
        assert again.dev.records == splits.dev.records
        assert splits_from(read_file("train.csv"), label="label").dev == splits.dev

    def test_datasets_with_class_names_and_lists_of_them(self) -> None:
        names = ["O", "B-PER"]
        features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
        table = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[0, 1]]}, features=features)
        splits = splits_from(table, dev=labelled(2))
        assert splits.train.records == [{"tokens": ["a", "b"], "tags": ["O", "B-PER"]}]
        assert splits.train.features == {"tags": ("O", "B-PER")}
        assert splits.dev.records[1]["label"] == "positive"

    def test_hidden_labels(self) -> None:
        table = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=LABELLED)
        with pytest.raises(DataError, match=r"^test row 2: 'label' is -1, a hidden label; choose a split"):
            splits_from(labelled(2), labelled(2), table)

    @pytest.mark.parametrize(
        ("table", "kind", "message"),
        [
            ("train.csv", UsageError, r"^train is a str; give a list of dicts"),
            (DatasetDict(), UsageError, r"^train is a DatasetDict; give a list"),
            (None, UsageError, r"^train is missing"),
            ([{"text": "a"}, "b"], DataError, r"^train row 2 is a str; each row is a dict"),
            ([], DataError, r"^train: no rows"),
            (Dataset.from_dict({"text": []}), DataError, r"^train: no rows"),
        ],
    )
    def test_refused(self, table: Any, kind: type[PeftkitError], message: str) -> None:
        with pytest.raises(kind, match=message):
            splits_from(table)

    def test_bad_fraction(self) -> None:
        with pytest.raises(ValidationError, match="dev_fraction"):
            splits_from([{"text": "a"}], dev_fraction=1.5)
