"""Reading one file: against independent readers, real files, and every fault with its place."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from peftkit.data.files import SUFFIXES, Rows, read_file
from peftkit.data.sources import DataSettings, read_splits
from peftkit.data.tables import Columns
from peftkit.errors import DataError, PeftkitError, UsageError

Write = Callable[[str, str | bytes], Path]

AWKWARD = ["NA", "None", "null", "", "nan", "1.0", "a,b", 'say "hi"', "two\nlines", " spaced ", "é\u2028ü", "\u00a0"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working folder, so that a test reads it by its bare name."""
    monkeypatch.chdir(tmp_path)

    def writer(name: str, content: str | bytes) -> Path:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Path(name)

    return writer


def awkward_records(count: int = 200) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"text": draw.choice(AWKWARD), "label": draw.choice(AWKWARD), "id": str(i)} for i in range(count)]


class TestCsv:
    def test_same_as_pandas_on_awkward_fields(self, write: Write) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "label", "id"])
        writer.writeheader()
        writer.writerows(awkward_records())
        path = write("train.csv", text.getvalue())
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
        assert read_file(path).records == frame.to_dict("records") == awkward_records()

    def test_place_is_the_line_where_the_record_starts(self, write: Write) -> None:
        rows = read_file(write("a.csv", 'text,label\r\n"one\r\ntwo\r\n",x\r\n\r\nlast,y\r\n'))
        assert list(rows.places) == [2, 6]
        assert rows.where(1) == "a.csv:6"
        assert rows.records[0] == {"text": "one\r\ntwo\r\n", "label": "x"}

    def test_a_byte_order_mark_is_no_part_of_the_first_name(self, write: Write) -> None:
        assert read_file(write("a.csv", b"\xef\xbb\xbftext\nhi\n")).column_names == ("text",)

    def test_suffix_in_capitals(self, write: Write) -> None:
        assert len(read_file(write("A.CSV", "text\nhi\n"))) == 1

    def test_last_line_without_an_end(self, write: Write) -> None:
        assert read_file(write("a.csv", "text,label\nhi,")).records == [{"text": "hi", "label": ""}]

    def test_a_field_longer_than_the_limit_of_csv(self, write: Write) -> None:
        before = csv.field_size_limit()
        rows = read_file(write("a.csv", f"text\n{'x' * 200_000}\n"))
        assert len(rows.records[0]["text"]) == 200_000
        assert csv.field_size_limit() == before

    def test_a_million_rows_in_seconds(self, write: Write) -> None:
        lines = (f'"some text, number {i}",class{i % 7}\n' for i in range(1_000_000))
        path = write("big.csv", "text,label\n" + "".join(lines))
        start = time.process_time()
        rows = read_file(path)
        assert time.process_time() - start < 30  # of the processor; 6 to 10 here, a quadratic reader takes hours
        assert len(rows) == 1_000_000
        assert rows.where(999_999) == "big.csv:1000001"


class TestTabSeparated:
    def test_a_quote_is_a_character(self, write: Write) -> None:
        path = write("a.tsv", 'text\tlabel\n"open\tNA\nsay "hi"\t""\n')
        frame = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
        assert read_file(path).records == frame.to_dict("records")
        assert read_file(path).records[0] == {"text": '"open', "label": "NA"}

    def test_unicode_line_separators_stay_in_the_field(self, write: Write) -> None:
        rows = read_file(write("a.tsv", "text\tlabel\r\na\u2028b\x85c\x0bd\tx\r\ne\ty\r\n"))
        assert rows.records[0] == {"text": "a\u2028b\x85c\x0bd", "label": "x"}
        assert list(rows.places) == [2, 3]

    def test_orange_has_three_header_lines(self, write: Write) -> None:
        rows = read_file(write("a.tab", 'Category\tText\nd\tstring\nclass\tmeta\n\nearn\t"shr\nacq\tx\n'))
        assert rows.records == [{"Category": "earn", "Text": '"shr'}, {"Category": "acq", "Text": "x"}]
        assert list(rows.places) == [5, 6]

    def test_orange_flags_may_be_blank_or_have_attributes(self, write: Write) -> None:
        assert len(read_file(write("a.tab", "a\tb\ns\tc\n\nx\ty\n"))) == 1
        assert len(read_file(write("b.tab", "a\tb\ns\tc\nmeta title=My\\ Title\tc\nx\ty\n"))) == 1


class TestJson:
    def test_array_keeps_types(self, write: Write) -> None:
        records = [{"text": "NA", "n": 1, "x": 1.5, "none": None, "tags": ["a"]}, {"text": "", "n": 2}]
        rows = read_file(write("a.json", json.dumps(records, indent=2)))
        assert rows.records == records
        assert rows.column_names == ("text", "n", "x", "none", "tags")
        assert rows.where(1) == "a.json row 2"

    def test_object_with_one_list_of_objects(self, write: Write) -> None:
        document = {"version": "1", "labels": ["a", "b"], "data": [{"text": "x"}]}
        assert read_file(write("a.json", json.dumps(document))).records == [{"text": "x"}]

    @pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
    def test_lines(self, write: Write, suffix: str) -> None:
        records = awkward_records(20)
        text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        rows = read_file(write(f"a{suffix}", text))
        assert rows.records == records
        assert list(rows.places) == list(range(1, 40, 2))


def test_parquet_is_what_pyarrow_reads(write: Write) -> None:
    table = pyarrow.table({"text": ["NA", "", None], "label": [0, 1, 2], "tags": [["a"], [], ["b", "c"]]})
    parquet.write_table(table, write("a.parquet", b""))
    rows = read_file("a.parquet")
    assert rows.records == table.to_pylist()
    assert rows.where(2) == "a.parquet row 3"


def test_parquet_in_a_folder_called_like_a_partition(write: Write) -> None:
    Path("year=2024").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a"]}), "year=2024/a.parquet")
    assert read_file("year=2024/a.parquet").column_names == ("text",)


class TestConll:
    @pytest.mark.parametrize("suffix", [".conll", ".bio", ".iob", ".iob2"])
    def test_sentences(self, write: Write, suffix: str) -> None:
        rows = read_file(write(f"a{suffix}", "-DOCSTART- O\n\nEU B-ORG\nrejects O\n\n\nPeter B-PER\n"))
        assert rows.records == [
            {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
            {"tokens": ["Peter"], "tags": ["B-PER"]},
        ]
        assert list(rows.places) == [3, 7]

    def test_middle_columns(self, write: Write) -> None:
        rows = read_file(write("a.conll", "EU NNP I-NP B-ORG\nrejects VBZ I-VP O\n"))
        assert rows.records == [
            {
                "tokens": ["EU", "rejects"],
                "tags": ["B-ORG", "O"],
                "column_2": ["NNP", "VBZ"],
                "column_3": ["I-NP", "I-VP"],
            }
        ]

    def test_a_lone_tab_ends_a_sentence(self, write: Write) -> None:
        assert len(read_file(write("a.conll", "a\tO\n\t\nb\tO\n \nc\tO"))) == 3

    def test_odd_spaces_are_tokens_between_tabs(self, write: Write) -> None:
        rows = read_file(write("a.conll", "\u00a0\tO\nNew York\tB-LOC\n\u2009x\tO\n"))
        assert rows.records[0]["tokens"] == ["\u00a0", "New York", "\u2009x"]


FAULTS = {
    "csv empty": ("a.csv", "", "a.csv:1: the file is empty"),
    "tsv blank": ("a.tsv", "\n \n", "a.tsv:1: the file is empty"),
    "json empty": ("a.json", "", "a.json:1: the file is empty"),
    "csv header only": ("a.csv", "\ntext,label\n", "a.csv:2: only a header"),
    "tab header only": ("a.tab", "a\tb\ns\ts\nmeta\tclass\n", "a.tab:1: only a header"),
    "csv empty column": ("a.csv", ",text\n0,hi\n", "a.csv:1: column 1 of the header has no name"),
    "tsv blank column": ("a.tsv", "text\t \n0\thi\n", "a.tsv:1: column 2 of the header has no name"),
    "tab no names": ("a.tab", "\nd\nclass\nx\n", "a.tab:1: column 1 of the header has no name"),
    "csv twice": ("a.csv", "text,label,text\n1,2,3\n", "a.csv:1: two columns are called 'text'"),
    "csv too many": ("a.csv", 'text,label\n"a\nb",x\na,b,c\n', "a.csv:4: 3 fields, the header has 2; put quotes"),
    "csv too few": ("a.csv", "text,label\nalone\n", "a.csv:2: 1 fields, the header has 2"),
    "tsv too many": ("a.tsv", "text\tlabel\nx\ty\nx\ty\tz\n", "a.tsv:3: 3 fields, the header has 2; a field"),
    "tab too few": ("a.tab", "a\tb\ns\ts\n\t\nx\n", "a.tab:4: 1 fields, the header has 2"),
    "tab is a tsv": ("a.tab", "a\tb\nx\ty\nx\ty\n", "a.tab:3: 'x' is no flag"),
    "tab two lines": ("a.tab", "a\tb\nx\ty", "a.tab:3: '(nothing)' is no flag"),
    "open quote": ("a.csv", 'text,label\na,b\n"never\nclosed,x\n', "a.csv:3: a quote opened in this row is never"),
    "open quote in header": ("a.csv", '"text,label\na,b\n', "a.csv:1: a quote opened in this row is never"),
    "inner quote": ("a.csv", 'text,label\n"a" b,c\n', "a.csv:2: a quote in this row ends within a field (line 2"),
    "nul": ("a.tsv", "text\tlabel\na\tb\nc\0\td\n", "a.tsv:3: a NUL byte"),
    "nul in conll": ("a.conll", "a O\n\0 O\n", "a.conll:2: a NUL byte"),
    "latin-1": ("a.csv", "text\nok\ncafé\n".encode("latin-1"), "a.csv:3: byte 0xe9 is not UTF-8"),
    "utf-16": ("a.csv", "text\nhi\n".encode("utf-16"), "a.csv:1: byte 0xff is not UTF-8"),
    "json cut": ("a.json", '[{"text": "a"},\n {"text": "b"', "a.json:2: column 14: "),
    "jsonl deep": ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, "a.jsonl:2: nested too deeply"),
    "json scalar": ("a.json", "3", "a.json:1: 0 lists of objects"),
    "json two lists": ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "a.json:1: 2 lists of objects"),
    "json no object": ("a.json", '[{"x": 1}, [2]]', "a.json row 2: [2] is not an object"),
    "json no rows": ("a.json", "[]", "a.json:1: the file has no rows"),
    "jsonl cut": ("a.jsonl", '{"a": 1}\n\n{"a": "b\n', "a.jsonl:3: column 7: "),
    "jsonl no object": ("a.jsonl", '{"a": 1}\n"b"\n', 'a.jsonl:2: "b" is not an object'),
    "conll ragged": ("a.conll", "a\tO\nb\tx\tO\n", "a.conll:2: 3 columns, the lines before have 2"),
    "conll no tags": ("a.conll", "\nalone\n", "a.conll:2: no tag"),
    "conll empty tag": ("a.conll", "a\tO\nb\t\n", "a.conll:2: column 2 is empty"),
    "conll empty token": ("a.conll", "a\tO\n\tO\n", "a.conll:2: column 1 is empty"),
    "conll no sentence": ("a.conll", "-DOCSTART- O\n", "a.conll:1: the file has no rows"),
    "parquet empty": ("a.parquet", "", "a.parquet: not a readable parquet file"),
    "parquet not": ("a.parquet", "text,label\n" * 9, "a.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_names_its_place(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_file(write(name, content))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class TestOddFiles:
    def test_packed(self, write: Write) -> None:
        packed = gzip.compress(b"text\tlabel\nhi\tx\n\nho\ty\n")
        rows = read_file(write("a.tsv.gz", packed))
        assert rows.records == [{"text": "hi", "label": "x"}, {"text": "ho", "label": "y"}]
        assert rows.where(1) == "a.tsv.gz:4"

    @pytest.mark.parametrize("cut", [False, True])
    def test_not_packed_or_cut(self, write: Write, cut: bool) -> None:
        # Packed here and not as a parameter: a test's name must not hold the clock that gzip writes.
        content = gzip.compress(b"text\nhi\n" * 99)[:-12] if cut else b"text\n"
        with pytest.raises(DataError, match=r"^a\.csv\.gz: not a whole gzip file"):
            read_file(write("a.csv.gz", content))

    def test_another_format_than_the_suffix_says(self, write: Write) -> None:
        rows = read_file(write("a.txt", "text\tlabel\nhi\tx\n"), format="tsv")
        assert rows.records == [{"text": "hi", "label": "x"}]

    @pytest.mark.parametrize(("format", "text"), [("csv", "a,b\n\n1,2\n"), ("tsv", "a\tb\n\n1\t2\n")])
    def test_names_of_columns_for_a_file_without_a_header(self, write: Write, format: str, text: str) -> None:
        rows = read_file(write("a.data", text), format=format, columns=Columns(("x", "y")))
        assert rows.records == [{"x": "a", "y": "b"}, {"x": "1", "y": "2"}]
        assert list(rows.places) == [1, 3]

    def test_fields_beyond_the_columns(self, write: Write) -> None:
        path = write("a.tsv", "1\tgood\tx\ty\n2\tbad\n")
        rows = read_file(path, columns=Columns(("n", "text"), ignore_extra=True))
        assert rows.records == [{"n": "1", "text": "good"}, {"n": "2", "text": "bad"}]

    def test_as_the_configuration_names_them(self, write: Write) -> None:
        write("odd.csv", "1\tgood\tx\n2\tbad\n")
        write("dev.tsv", "n\ttext\n3\tfine\n")
        odd = {"file": "odd.csv", "format": "tsv", "columns": ["n", "text"], "ignore_extra": True}
        splits = read_splits(DataSettings.model_validate({"train": odd, "dev": "dev.tsv"}))
        assert splits.train.records == [{"n": "1", "text": "good"}, {"n": "2", "text": "bad"}]
        assert splits.train.where(1) == "odd.csv:2"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"format": "tvs"}, "no format 'tvs'; did you mean 'tsv'?"),
            ({"columns": ["a", "a"]}, "two columns have one name"),
            ({"columns": []}, "at least 1 item"),
            ({"colums": ["a"]}, "colums"),
        ],
    )
    def test_refused_settings(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=re.escape(message)):
            DataSettings.model_validate({"train": {"file": "a.csv"} | given})

    def test_a_data_set_with_a_name_has_no_files(self) -> None:
        with pytest.raises(ValidationError, match="with name, train, dev and test are names of splits"):
            DataSettings.model_validate({"name": "glue", "train": {"file": "a.csv"}})

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"format": "tvs"}, UsageError, "a.csv: no format 'tvs'; did you mean 'tsv'?"),
            (
                {"format": "jsonl", "columns": Columns(("x",))},
                UsageError,
                "a.csv: columns can be given for csv and tsv files",
            ),
            ({"columns": Columns(("a",))}, DataError, "a.csv:1: 2 fields, columns names 1"),
            ({"columns": Columns(("a", "b", "c"), True)}, DataError, "a.csv:1: 2 fields, columns names 3"),
            ({"columns": Columns(("a", "b"))}, DataError, "a.csv:1: this line holds the names of the columns; leave"),
        ],
    )
    def test_settings_that_do_not_fit(
        self, write: Write, settings: dict[str, Any], error: type[PeftkitError], message: str
    ) -> None:
        with pytest.raises(error) as caught:
            read_file(write("a.csv", "a,b\n1,2\n"), **settings)
        assert str(caught.value).startswith(message)


def test_parquet_without_rows_or_with_a_column_twice(write: Write) -> None:
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), write("a.parquet", b""))
    with pytest.raises(DataError, match=r"^a\.parquet: only column names, no rows"):
        read_file("a.parquet")
    parquet.write_table(pyarrow.table([[1], [2]], names=["x", "x"]), "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet: two columns are called 'x'"):
        read_file("a.parquet")


class TestRefusedBeforeReading:
    def test_missing_file_names_the_nearest(self, write: Write, tmp_path: Path) -> None:
        write("train.tsv", "a\nb\n")
        with pytest.raises(UsageError) as caught:
            read_file("trian.tsv")
        assert str(caught.value) == f"trian.tsv: no such file in {tmp_path}; did you mean 'train.tsv'?"

    def test_missing_file_like_no_other(self, write: Write) -> None:
        with pytest.raises(UsageError, match=r"^qqq\.json: no such file in .*; check the path$"):
            read_file("qqq.json")

    def test_missing_folder(self, write: Write) -> None:
        with pytest.raises(UsageError, match=r"^none/a\.csv: .*none, which is no folder; check the path$"):
            read_file("none/a.csv")

    def test_folder(self, write: Write) -> None:
        Path("data.csv").mkdir()
        with pytest.raises(DataError, match=r"^data\.csv: a folder, not a file"):
            read_file("data.csv")

    @pytest.mark.parametrize("name", ["a.xlsx", "a", "a.csv.bz2", "a.gz"])
    def test_unknown_suffix_lists_the_known(self, write: Write, name: str) -> None:
        with pytest.raises(UsageError) as caught:
            read_file(write(name, "x"))
        assert str(caught.value).startswith(f"{name}: cannot read")
        assert all(suffix in str(caught.value) for suffix in SUFFIXES)

    def test_unreadable(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, mode: str) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        path = write("a.csv", "x\n1\n")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"^a\.csv: cannot be read: Permission denied; check"):
            read_file(path)


class TestRows:
    rows = Rows("a.tsv", [{"text": "x", "label": "1"}, {"text": "y"}, {"text": "z", "label": "2"}], [2, 3, 5])

    def test_require_names_the_nearest_column(self) -> None:
        with pytest.raises(DataError) as caught:
            self.rows.require("text", "lable")
        assert str(caught.value) == "a.tsv: no column 'lable'; did you mean 'label'?"

    def test_require_lists_columns_when_none_is_alike(self) -> None:
        with pytest.raises(DataError, match=r"^a\.tsv: no column 'Q'; it can be: label, text$"):
            self.rows.require("Q")

    def test_require_names_the_row_that_lacks_it(self) -> None:
        with pytest.raises(DataError, match=r"^a\.tsv:3: no 'label' in this row"):
            self.rows.require("label")
        self.rows.require("text")

    def test_take_and_head_keep_places(self) -> None:
        taken = self.rows.take([2, 0])
        assert [taken.where(i) for i in range(len(taken))] == ["a.tsv:5", "a.tsv:2"]
        assert self.rows.head(2).records == self.rows.records[:2]
        assert list(self.rows.head(99).places) == [2, 3, 5]


def test_cut_anywhere_reads_or_is_refused(write: Write) -> None:
    """No prefix of a good file ends in anything but rows or a PeftkitError."""
    good = {
        "a.csv": 'text,label\n"a ""q""\nb",x\né,y\n',
        "a.tab": "a\tb\ns\td\nmeta\tclass\nx\ty\n",
        "a.json": '{"data": [{"text": "é"}, {"text": null}]}',
        "a.jsonl": '{"text": "é"}\n{"text": 1}\n',
        "a.conll": "a x O\nb y B-é\n\n\t\nc z O\n",
    }
    for name, text in good.items():
        for length in range(len(text.encode())):
            try:
                assert len(read_file(write(name, text.encode()[:length]))) > 0
            except PeftkitError as problem:
                assert name in str(problem)


def test_import_is_light() -> None:
    code = "import sys, peftkit.data.sources; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "numpy"]
    root = Path(__file__).parents[1]
    run = [sys.executable, "-c", code, *heavy]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


REAL_COUNTS: dict[str, tuple[int, str]] = {
    "sst2/train.tsv": (6920, "label"),
    "sst2/dev.tsv": (872, "label"),
    "sst2/test.tsv": (1821, "label"),
    "banking77/train.csv": (10003, "category"),
    "banking77/test.csv": (3080, "category"),
    "glue_mrpc/train.tsv": (3668, "Quality"),
    "glue_mrpc/dev.tsv": (408, "Quality"),
    "glue_mrpc/test.tsv": (1725, "Quality"),
    "glue_stsb/train.tsv": (5749, "score"),
    "glue_stsb/dev.tsv": (1500, "score"),
    "tweet_emotion/train.jsonl": (3257, "label"),
    "tweet_emotion/test.jsonl": (1421, "label"),
    "gsm8k/train.jsonl": (7473, "answer"),
    "gsm8k/test.jsonl": (1319, "answer"),
    "wnut17/train.conll": (3394, "tags"),
    "wnut17/dev.conll": (1009, "tags"),
    "wnut17/test.conll": (1287, "tags"),
    "alpaca_en_demo/alpaca_en_demo.json": (999, "output"),
    "xquad_en/xquad.en.json": (1190, "answers"),
}


def real_file(name: str) -> Path:
    folder = os.environ.get("PEFTKIT_DATA")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"needs PEFTKIT_DATA, the folder that holds {name}")
    return Path(folder) / name


@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_counts(name: str) -> None:
    rows = read_file(real_file(name))
    count, column = REAL_COUNTS[name]
    rows.require(column)
    assert len(rows) == count


def as_pandas(path: Path) -> list[dict[Any, Any]]:
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    return pandas.read_csv(path, dtype=str, keep_default_na=False, **options).to_dict("records")


@pytest.mark.parametrize("name", [name for name in REAL_COUNTS if name.endswith((".tsv", ".csv"))])
def test_real_tables_are_what_pandas_reads(name: str) -> None:
    path = real_file(name)
    assert read_file(path).records == as_pandas(path)


def test_real_places_point_at_their_lines() -> None:
    path = real_file("banking77/train.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = read_file(path)
    for record, place in zip(rows.records, rows.places, strict=True):
        assert lines[place - 1].lstrip('"').startswith(record["text"].splitlines()[0].split('"')[0])


def test_real_entities_keep_every_token() -> None:
    path = real_file("wnut17/test.conll")
    rows = read_file(path)
    assert sum(len(record["tokens"]) for record in rows.records) == 23394
    assert all(len(record["tokens"]) == len(record["tags"]) for record in rows.records)


def test_a_packed_line_without_an_end_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkit.data.files.MOST_LINE", 100)
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n' + b" " * 101))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:2: a line of more than 100 bytes; unpack it"):
        read_file(file)
    file.write_bytes(gzip.compress(b'{"text": "a"}\n' * 50))
    assert len(read_file(file)) == 50
