"""Broken data through the command line: one clear error with file and line, or a counted note; never silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from audit_corpus import Row, answered, byte_backbone, clean, comma, jsonl, replace_line, tsv

from peftkit.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def backbones(tiny_bert: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bert": tiny_bert, "llama": tiny_llama, "bytes": byte_backbone(tmp_path_factory.mktemp("bytes"))}


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backbones: dict[str, Path],
) -> Run:
    """Run a verb on a train file, and sound dev and test files beside it: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(
        verb: str,
        train: bytes,
        *arguments: str,
        suffix: str = "jsonl",
        rows: dict[str, list[Row]] | None = None,
        backbone: str = "bert",
        **task: Any,
    ) -> tuple[int, str, str]:
        Path(f"train.{suffix}").write_bytes(train)
        for split in ("dev", "test"):
            Path(f"{split}.jsonl").write_bytes(jsonl((rows or clean())[split]))
        files = {"train": f"train.{suffix}", "dev": "dev.jsonl", "test": "test.jsonl"}
        config = {
            "backbone": {"name": str(backbones[backbone])},
            "task": {"kind": "sequence_classification", "data": files, "max_length": 32} | task,
            "method": {"kind": "lora", "rank": 2},
            "training": {"learning_rate": 0.001, "max_steps": 1, "batch_size": 4, "evaluate_every": 1},
            "output": {"folder": "run"},
        }
        Path("config.yaml").write_text(yaml.safe_dump(config))
        code = main([verb, "config.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def changed(row: int = 6, **values: Any) -> list[Row]:
    rows = clean()["train"]
    rows[row].update(values)
    return rows


def chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def chats(wrong: Row) -> dict[str, list[Row]]:
    rows = {
        split: [chat(("user", row["text"]), ("assistant", "good")) for row in rows] for split, rows in clean().items()
    }
    return rows | {"dev": [wrong, *rows["dev"][1:]]}


def questions(wrong: Row) -> list[Row]:
    return [wrong, *(answered(row["text"]) for row in clean()["train"][1:])]


LATIN = replace_line(8, lambda line: line + "é".encode("latin-1"))
MIXED = [row | {"label": index % 2 if index == 6 else str(index % 2)} for index, row in enumerate(clean()["train"])]
NUMBERED = {split: [row | {"label": str(i % 2)} for i, row in enumerate(rows)] for split, rows in clean().items()}
QA: dict[str, Any] = {"kind": "question_answering", "max_answer_length": 3, "stride": 4}
QUESTIONS = {split: [answered(row["text"]) for row in rows] for split, rows in clean().items()}
NO_SPAN = {"question": "who", "context": "alice went", "answers": {"text": ["bob"], "answer_start": [0]}}
CHAT: dict[str, Any] = {"kind": "chat", "template": "plain", "max_length": 200, "backbone": "bytes"}
SOUND_CHATS = jsonl(chats(chat(("user", "good"), ("assistant", "bad")))["train"])

# train file, what else the run needs, and what the one line of error must hold
REFUSED: dict[str, tuple[bytes, dict[str, Any], tuple[str, ...]]] = {
    "mixed str and int labels": (
        jsonl(MIXED),
        {"rows": NUMBERED},
        ("mixed-label-types: train: 'label' is numbers in 1 of 60 rows (train.jsonl:7)", "--allow mixed-label-types"),
    ),
    "label typo": (
        jsonl(changed(label="postive")),
        {},
        ("label-typo: train: label 'postive' occurs 1 time, 'positive' 30 times (train.jsonl:7)", "write both alike"),
    ),
    "extra comma": (
        replace_line(8, lambda line: line + b",more")(comma(clean()["train"])),
        {"suffix": "csv"},
        ("train.csv:8: 4 fields, the header has 3", "quotes around a field"),
    ),
    "missing label": (jsonl(changed(label=None)), {}, ("train.jsonl:7: no label; fill in 'label'",)),
    "empty text": (jsonl(changed(text=" ")), {}, ("train.jsonl:7: no text in 'text'", "remove the row or fill it in")),
    "NUL byte": (
        replace_line(8, lambda line: line + b"\0")(tsv(clean()["train"])),
        {"suffix": "tsv"},
        ("train.tsv:8: a NUL byte", "write the file again"),
    ),
    "latin-1 in UTF-8": (LATIN(tsv(clean()["train"])), {"suffix": "tsv"}, ("train.tsv:8: byte 0xe9 is not UTF-8",)),
    "JSON line cut in half": (
        replace_line(7, lambda line: line[: len(line) // 2])(jsonl(clean()["train"])),
        {},
        ("train.jsonl:7: column ", "the file is cut or is not JSON"),
    ),
    "ragged row": (
        replace_line(8, lambda line: line.rpartition(b"\t")[0])(tsv(clean()["train"])),
        {"suffix": "tsv"},
        ("train.tsv:8: 2 fields, the header has 3",),
    ),
    "duplicate column": (
        replace_line(1, lambda line: b"text,text,label")(comma(clean()["train"])),
        {"suffix": "csv"},
        ("train.csv:1: two columns are called 'text'; rename one",),
    ),
    "answer that is not in the context": (
        jsonl(questions(NO_SPAN)),
        QA | {"rows": QUESTIONS},
        ("train.jsonl:1: an answer does not stand in the context at its answer_start",),
    ),
    "turns out of order": (
        SOUND_CHATS,
        CHAT | {"rows": chats(chat(("assistant", "good"), ("user", "bad")))},
        ("dev.jsonl:1: turns out of order",),
    ),
    "unknown role": (
        SOUND_CHATS,
        CHAT | {"rows": chats(chat(("robot", "good"), ("assistant", "bad")))},
        ("dev.jsonl:1: unknown role 'robot'",),
    ),
    "chat without an assistant turn": (
        SOUND_CHATS,
        CHAT | {"rows": chats(chat(("user", "good")))},
        ("dev.jsonl:1: no assistant turn",),
    ),
    "one class": (
        jsonl([row | {"label": "positive"} for row in clean()["train"]]),
        {},
        ("train.jsonl: column 'label' has 1 label; classification needs two",),
    ),
    "half a character": (
        replace_line(7, lambda line: line.replace(b'"text": "', b'"text": "\\ud83d'))(jsonl(clean()["train"])),
        {},
        ("train.jsonl:7: half a character",),
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_one_line_with_place_and_mend(run: Run, fault: str) -> None:
    train, settings, expected = REFUSED[fault]
    code, _, error = run("train", train, **settings)
    assert code == 1
    assert all(part in error for part in expected), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not Path("run").exists()


def test_all_labels_masked(run: Run) -> None:
    rows = clean()
    tagged = {
        split: [{"tokens": row["text"].split()[:3], "tags": ["O", "B-X", "O"]} for row in part]
        for split, part in rows.items()
    }
    for index, row in enumerate(tagged["train"]):
        row["tokens"] = ["\u00ad", "\u00ad", "\u00ad" * (index + 1)]  # no tokenizer has a token for soft hyphens
    code, _, error = run("train", jsonl(tagged["train"]), rows=tagged, kind="token_classification")
    assert code == 1
    assert "all-masked: train: nothing is supervised in 60 of 60 examples (train.jsonl:1, train.jsonl:2, " in error
    assert error.count("\n") == 1


def test_words_that_others_read_as_missing_are_text_and_counted(run: Run) -> None:
    rows = clean()["train"]
    for index, word in enumerate(("NA", "None", "null")):
        rows[index]["text"] = word
    code, said, _ = run("train", jsonl(rows), rows=clean())
    assert code == 0
    places = "(train.jsonl:1, train.jsonl:2, train.jsonl:3)"
    assert f"audit     text-reads-as-missing: train: 3 rows: 'text' is a word such as NA or null {places}" in said
    assert "60 train, 20 dev, 20 test rows" in said


def test_a_row_of_a_million_characters_is_cut_and_told(run: Run) -> None:
    code, said, _ = run("train", jsonl(changed(text="good " * 200_000)))
    assert code == 0
    assert "train: 1 of 60 rows (1.7 %) are cut at 32 tokens" in said
    assert "long-text: train: 1 row: more than 100,000 characters in 'text' (train.jsonl:7)" in said


def test_chats_without_an_answer_are_left_out_of_train_and_counted(run: Run) -> None:
    rows = chats(chat(("user", "good"), ("assistant", "bad")))
    train = [*rows["train"], chat(("user", "good"))]
    code, said, _ = run("audit", jsonl(train), "--json", rows=rows, **CHAT)
    (dropped,) = [one for one in json.loads(said)["findings"] if one["name"] == "dropped"]
    assert code == 0
    assert (dropped["count"], dropped["places"]) == (1, ["train.jsonl:61"])
    assert "no assistant turn" in dropped["what"]


def test_padding_that_is_the_end_token_stays_supervised(run: Run, backbones: dict[str, Path]) -> None:
    """The ids are counted here by hand: every example of a completion ends in </s>, which pads too."""
    rows = {
        split: [{"prompt": row["text"], "completion": "good film"} for row in part] for split, part in clean().items()
    }
    code, said, _ = run("audit", jsonl(rows["train"]), "--json", rows=rows, backbone="llama", kind="completion")
    report = json.loads(said)
    assert code == 0
    assert [one["name"] for one in report["findings"]] == ["pad-is-end-token"]
    assert [split["with_end"] for split in report["splits"]] == [60, 20, 20]


@pytest.mark.parametrize("verb", ["train", "audit"])
def test_a_missing_file_and_a_wrong_name_are_usage_errors(run: Run, verb: str) -> None:
    sound = jsonl(clean()["train"])
    code, _, error = run(verb, sound, "--allow", "duplicate")
    assert (code, error) == (2, "error: --allow: no finding 'duplicate'; did you mean 'duplicates'?\n")
    code, _, error = run(verb, sound, "--allow", "refused")
    assert (code, error.count("\n")) == (2, 1)
    assert "'refused' cannot be allowed" in error
    code, _, error = run(verb, sound, "task.data.train=trian.jsonl")
    assert (code, error.count("\n")) == (2, 1)
    assert "trian.jsonl: no such file" in error
    assert "did you mean 'train.jsonl'?" in error
