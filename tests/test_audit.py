"""The audit of data: every planted fault with its place, none on clean data, and the true counts of real sets."""

from __future__ import annotations

import io
import json
import random
import re
import statistics
from array import array
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from audit_corpus import CORPUS, Planted, byte_backbone, clean, files_of, write
from transformers import AutoTokenizer

from peftkit import shipped
from peftkit.audit import examine
from peftkit.audit.catalogue import CHECKS
from peftkit.audit.findings import finding
from peftkit.audit.labels import typos
from peftkit.audit.outcome import Report
from peftkit.audit.repeats import Hashed, hashed, repeated, shared
from peftkit.audit.settings import AuditSettings
from peftkit.audit.terminal import show
from peftkit.audit.texts import READ_AS_MISSING, is_mojibake
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.files import Rows
from peftkit.data.mix import missing_files

CLEAN = Planted("", "", files_of(clean()), {"kind": "sequence_classification"}, grave=False)


@pytest.fixture(scope="module")
def backbones(tiny_bert: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bert": tiny_bert, "llama": tiny_llama, "bytes": byte_backbone(tmp_path_factory.mktemp("bytes"))}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def audited(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the report, and what was said to stderr."""
    code = main(["audit", *arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.parametrize("fault", CORPUS)
def test_every_planted_fault_is_found_where_it_is(
    fault: str, folder: Path, backbones: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    planted = CORPUS[fault]
    config = write(planted, folder, backbones[planted.backbone])
    code, report, error = audited(capsys, str(config))
    told = [one for one in report["findings"] if one["severity"] != "note" or one["name"] == planted.name]
    assert {one["name"] for one in told} == {planted.name, *planted.also}, [
        f"{one['name']}: {one['what']}" for one in told
    ]
    one = next(one for one in told if one["name"] == planted.name)
    assert any(planted.place in text for text in (*one["places"], one["what"])), one
    assert planted.count in (None, one["count"])
    assert code == planted.grave, (code, error)
    assert "Traceback" not in error


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 30


def test_clean_data_has_no_findings(folder: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, error = audited(capsys, str(write(CLEAN, folder, tiny_bert)))
    assert (code, report["findings"], error) == (0, [], "")


class TestFigures:
    def test_against_the_tokenizer(self, folder: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, report, _ = audited(capsys, str(write(CLEAN, folder, tiny_bert)), "task.max_length=8")
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        for split in report["splits"]:
            rows = clean()[split["name"]]
            whole = [len(tokenizer(row["text"]).input_ids) for row in rows]
            lengths = [min(length, 8) for length in whole]
            assert split["rows"] == split["examples"] == len(rows)
            assert split["tokens"] == sum(lengths)
            assert split["truncated"] == sum(length > 8 for length in whole)
            assert split["labels"] == Counter(row["label"] for row in rows)
            assert split["lengths"]["p50"] == statistics.median(lengths)
            assert split["lengths"]["mean"] == pytest.approx(statistics.fmean(lengths))
            assert sum(count for _, count in split["histogram"]) == len(rows)

    def test_a_split_in_many_parts_counts_the_same(
        self, folder: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = str(write(CORPUS["a row twice"], folder, tiny_bert))
        _, whole, _ = audited(capsys, config)
        monkeypatch.setattr(examine, "PART", 7)
        _, parts, _ = audited(capsys, config)
        for report in (whole, parts):
            report.pop("examples")
        assert parts == whole

    def test_supervised_tokens_are_marked(self, folder: Path, backbones: dict[str, Path], capsys: Any) -> None:
        config = write(CORPUS["padding and end are one token"], folder, backbones["llama"])
        _, report, _ = audited(capsys, str(config))
        (prompt, nothing), (answer, mark) = report["examples"][0]["pieces"]
        assert (prompt.split(), nothing) == (clean()["train"][0]["text"].split(), "")
        assert (answer.replace(" ", ""), mark) == ("goodfilm</s>", "learnt")


class TestStops:
    def test_training_stops_with_place_and_name_and_goes_on_when_allowed(
        self, folder: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = str(write(CORPUS["a fifth of test in train"], folder, tiny_bert))
        assert main(["train", config]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: audit: overlap-test: test: 4 of 20 rows are in train too (test.jsonl:1 = ")
        assert error.endswith("; remove it from train; to let it through: --allow overlap-test\n")
        assert main(["train", config, "--allow", "overlap-test"]) == 0
        assert "overlap-test: test: 4 of 20 rows are in train too, which is allowed" in capsys.readouterr().out

    def test_allowed_in_the_configuration_or_below_its_threshold(
        self, folder: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = str(write(CORPUS["a fifth of test in train"], folder, tiny_bert))
        for override, code in (("audit.allow=[overlap-test]", 0), ("audit.overlap=0.2", 0), ("audit.overlap=0.19", 1)):
            assert audited(capsys, config, override)[0] == code

    def test_several_findings_are_listed(self, folder: Path, tiny_bert: Path, capsys: Any) -> None:
        splits = clean()
        splits["train"][3]["label"], splits["train"][5]["label"] = "postive", 7
        config = write(Planted("", "", files_of(splits), CLEAN.task), folder, tiny_bert)
        assert main(["train", str(config), "audit.rare_label=0"]) == 1
        first, *others = capsys.readouterr().err.splitlines()
        assert first.startswith("error: audit: 2 findings stop training; to let it through: --allow ")
        assert "--allow label-typo" in first
        assert "--allow mixed-label-types" in first
        assert {line.split(":")[0].strip() for line in others} == {"label-typo", "mixed-label-types"}

    def test_a_wrong_name_in_the_configuration(self, folder: Path, tiny_bert: Path, capsys: Any) -> None:
        config = str(write(CLEAN, folder, tiny_bert))
        assert main(["validate", config, "audit.allow=[overlap_test]"]) == 2
        assert "audit.allow: no finding 'overlap_test'; did you mean 'overlap-test'?" in capsys.readouterr().err


class TestOutput:
    SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)> [red]bold[/red] \x1b[31m"

    @pytest.fixture
    def hostile(self, folder: Path, tiny_bert: Path) -> str:
        splits = clean()
        splits["train"][0]["text"] = self.SCRIPT
        for row in (0, 2, 4, 6):
            splits["train"][row]["label"] = "<b>label</b>"
        return str(write(Planted("", "", files_of(splits), CLEAN.task), folder, tiny_bert))

    def test_text_from_data_is_never_html(self, hostile: str, folder: Path, capsys: Any) -> None:
        main(["audit", hostile, "--html", "report.html"])
        text = Path("report.html").read_text(encoding="utf-8")
        parser = Tags()
        parser.feed(text)
        assert parser.found <= {
            *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "br", "code"),
            *("table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "text", "mark", "sup"),
        }
        assert "&lt;b&gt;label&lt;/b&gt;" in text
        assert not re.search(r"https?:|src=|href=|url\(|@import|<script|onerror=(?!alert\(1\)&gt;)", text)
        assert "default-src 'none'" in text
        assert "\x1b" not in text

    def test_text_from_data_is_no_markup_and_no_command_of_the_terminal(self, hostile: str, capsys: Any) -> None:
        main(["audit", hostile])
        said = capsys.readouterr().out
        assert "\x1b" not in said
        assert "<b>label</b>" in said
        assert "[UNK]" in said

    def test_colours_on_a_terminal_only(self) -> None:
        from rich.console import Console

        report = Report((), (finding("duplicates", "train", 2, "two [red]rows[/red]", ["a:1"]),), (), ())
        text = io.StringIO()
        show(report, Console(file=text, force_terminal=True, color_system="standard", width=200))
        assert "\x1b[33mwarning" in text.getvalue()
        assert "two [red]rows[/red]" in text.getvalue()

    def test_figures_and_findings_are_printed(self, folder: Path, tiny_bert: Path, capsys: Any) -> None:
        assert main(["audit", str(write(CORPUS["a row twice"], folder, tiny_bert))]) == 0
        said = capsys.readouterr().out
        assert re.search(r"train +60 +60 +540 +9 +9 +9 +9 +0 +0 +0\n", said)
        assert "negative  30 (50.0 %)" in said
        assert "warning duplicates: train: 1 of 60 rows repeat an earlier one (train.jsonl:7 = line 1)" in said


class Tags(HTMLParser):
    """The names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


class TestChecks:
    @pytest.mark.parametrize(
        ("label", "other", "slip"),
        [
            ("postive", "positive", True),
            ("Positive", "positive", True),
            ("card arrival", "card_arrival", True),
            ("B-PRE", "B-PER", True),
            ("no", "on", False),
            ("yes", "no", False),
            ("I-PER", "B-PER", False),
            ("grade_1", "grade_2", False),
            ("Cause-Effect(e2,e1)", "Cause-Effect(e1,e2)", False),
            ("joy", "toy", False),
        ],
    )
    def test_what_is_a_typo(self, label: str, other: str, slip: bool) -> None:
        assert typos({label: 1, other: 100}) == ({label: other} if slip else {})

    def test_labels_in_two_cases_are_one_however_often_they_occur(self) -> None:
        assert typos({"Joy": 50, "joy": 100, "toy": 50}) == {"Joy": "joy"}

    @pytest.mark.parametrize(
        "text", ["café", "naïve", "Straße", "don’t", "“quoted”", "CAFÉ…", "São Paulo", "привет", "日本", "£30", "ÀÉ »"]
    )
    def test_mojibake_is_told_from_text(self, text: str) -> None:
        assert not is_mojibake(text)
        wrong = text.encode().decode("cp1252", "replace")
        if "\ufffd" not in wrong and text != "日本":
            assert is_mojibake(wrong) == any(ord(letter) > 127 for letter in text)

    def test_words_that_pandas_reads_as_missing(self) -> None:
        import pandas

        written = "text\n" + "".join(f'"{word}"\n' for word in sorted(READ_AS_MISSING))
        assert pandas.read_csv(io.StringIO(written))["text"].isna().all()
        assert not pandas.read_csv(io.StringIO('text\n"none"\n"Na"\n"x"\n'))["text"].isna().any()

    def test_equal_digests_of_different_texts_are_no_duplicates(self) -> None:
        rows = Rows("a", [{"text": "one"}, {"text": "two"}, {"text": "one"}], [1, 2, 3])
        same = Hashed("train", rows, ["text"], array("Q", [7, 7, 7]))
        assert repeated(same) == {2: 0}
        assert shared(same, Hashed("dev", rows.take([1]), ["text"], array("Q", [7]))) == {1: 0}

    def test_repeats_against_sets(self) -> None:
        chance = random.Random(3)
        records = [{"text": f"text {chance.randrange(300)}"} for _ in range(500)]
        others = [{"text": f"text {chance.randrange(600)}"} for _ in range(200)]
        one, other = (hashed("x", Rows("x", part, range(len(part))), ["text"]) for part in (records, others))
        texts = [record["text"] for record in records]
        seen: set[str] = set()
        expected = {}
        for index, text in enumerate(texts):
            if text in seen:
                expected[index] = texts.index(text)
            seen.add(text)
        assert repeated(one) == expected
        assert shared(other, one) == {
            index: texts.index(record["text"]) for index, record in enumerate(others) if record["text"] in seen
        }


REAL = {  # (duplicates in train, dev, test; rows of test that are in train), counted below with sets
    "sst2_lora": (9, 0, 0, 2),
    "tweet_emotion_lora": (25, 0, 0, 0),
}


# one configuration for each data set and task
DATA_SETS = list(
    {
        json.dumps(yaml.safe_load(file.read_text())["task"], sort_keys=True): file
        for file in sorted((shipped.folder() / "configs").glob("*.yaml"), reverse=True)
    }.values()
)


class TestRealSets:
    @pytest.mark.parametrize("name", REAL)
    def test_counts(self, name: str, real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = load_run(shipped.folder() / "configs" / f"{name}.yaml")
        splits = run.task.splits()
        rows = {"train": splits.train, "dev": splits.dev, "test": splits.test}
        (column,) = run.task.text_columns(splits.train)
        found = {(one.name, one.split): one.count for one in examine.row_findings(run, rows, ())}
        texts = {split: [record[column] for record in part.records] for split, part in rows.items()}
        counted = [len(part) - len(set(part)) for part in texts.values()]
        counted.append(sum(text in set(texts["train"]) for text in set(texts["test"])))
        assert tuple(counted) == REAL[name]
        keys = [("duplicates", split) for split in texts] + [("overlap-test", "test")]
        assert tuple(found.get(key, 0) for key in keys) == REAL[name]

    @pytest.mark.parametrize("file", DATA_SETS, ids=lambda file: file.stem)
    def test_none_is_stopped(self, file: Path, real_data: Path) -> None:
        run = load_run(file)
        if missing_files(run.task.data):
            pytest.skip("the data set is not here")
        splits = run.task.splits()
        rows = {"train": splits.train, "dev": splits.dev} | ({"test": splits.test} if splits.test else {})
        found = examine.graded(examine.row_findings(run, rows, ()), run.audit)
        assert [one.line() for one in found if one.severity in ("error", "stop")] == []


def test_the_documentation_has_every_check() -> None:
    text = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.*?) \| (.*?) \|$", text, re.M)
    assert rows == [
        (one.name, one.severity, one.meaning + (f" (stops above `{one.threshold}`)" if one.threshold else ""), one.mend)
        for one in CHECKS.values()
    ]
    settings = re.findall(r"^\| `(\w+)` \| (\S+) \|", text.partition("## Thresholds")[2], re.M)
    fields = AuditSettings.model_fields
    assert settings == [(name, str(fields[name].default)) for name in fields if name != "allow"]
