"""A small clean data set, and one fault at a time planted in it: what the audit must call it, and where it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import CITIES, FILLERS, NEGATIVE, PEOPLE, POSITIVE

Row = dict[str, Any]
Splits = dict[str, list[Row]]
SIZES = {"train": 60, "dev": 20, "test": 20}
ROW = 6
"""The index of the row that most faults are planted in; in JSON lines it is line 7, in tables line 8."""


@dataclass
class Planted:
    """Files with one fault, and what is to be found."""

    name: str
    place: str
    """What one of the places, or the message, must hold: `train.jsonl:7`."""
    files: dict[str, bytes]
    task: dict[str, Any] = field(default_factory=dict)
    grave: bool = True
    """Whether training would stop."""
    count: int | None = 1
    """Rows that have the fault; None where what is counted is something else."""
    audit: dict[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    """What is true of the same rows as well."""
    backbone: str = "bert"
    """bert, llama, or llama with a tokenizer of bytes, for chats."""


def clean() -> Splits:
    """Different sentences in every row; one word tells the label; only words of the toy vocabulary."""
    chance, seen, splits = random.Random(5), set[str](), dict[str, list[Row]]()
    for split, count in SIZES.items():
        rows: list[Row] = []
        while len(rows) < count:
            label = ("negative", "positive")[len(rows) % 2]
            words = chance.sample(FILLERS, 6)
            words.insert(chance.randrange(7), chance.choice(POSITIVE if label == "positive" else NEGATIVE))
            text = " ".join(words)
            if text not in seen:
                seen.add(text)
                rows.append({"id": f"{split}{len(rows)}", "text": text, "label": label})
        splits[split] = rows
    return splits


def jsonl(rows: list[Row]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode("utf-8", "surrogatepass")


def tsv(rows: list[Row]) -> bytes:
    return "".join("\t".join(map(str, row)) + "\n" for row in [list(rows[0]), *(r.values() for r in rows)]).encode()


def comma(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def conll(rows: list[Row]) -> bytes:
    blocks = ("".join(f"{w}\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows)
    return "\n".join(blocks).encode()


WRITERS = {"jsonl": jsonl, "tsv": tsv, "csv": comma, "conll": conll}


def files_of(splits: Splits, suffix: str = "jsonl") -> dict[str, bytes]:
    return {f"{split}.{suffix}": WRITERS[suffix](rows) for split, rows in splits.items()}


def planted(
    name: str,
    change: Callable[[Splits], object],
    place: str | None = None,
    suffix: str = "jsonl",
    task: dict[str, Any] | None = None,
    **expected: Any,
) -> Planted:
    """The clean rows after a change of theirs."""
    splits = clean()
    change(splits)
    where = place or f"train.{suffix}:{ROW + (1 if suffix == 'jsonl' else 2)}"
    return Planted(
        name, where, files_of(splits, suffix), {"kind": "sequence_classification"} | (task or {}), **expected
    )


def set_text(value: Any) -> Callable[[Splits], None]:
    return lambda splits: splits["train"][ROW].update(text=value)


def set_label(value: Any, split: str = "train", row: int = ROW) -> Callable[[Splits], None]:
    return lambda splits: splits[split][row].update(label=value)


def within(insert: str) -> Callable[[Splits], None]:
    """Something inside a text that is fine otherwise."""
    return lambda splits: splits["train"][ROW].update(text=splits["train"][ROW]["text"] + insert)


def copy_row(source: str, row: int, target: str, at: int, **changes: Any) -> Callable[[Splits], None]:
    return lambda splits: splits[target][at].update({"text": splits[source][row]["text"]} | changes)


def every(change: Callable[[int, Row], Row]) -> Callable[[Splits], None]:
    def apply(splits: Splits) -> None:
        for rows in splits.values():
            rows[:] = [change(index, row) for index, row in enumerate(rows)]

    return apply


def many_overlaps(splits: Splits) -> None:
    for row in range(4):
        splits["test"][row]["text"] = splits["train"][row]["text"]


def broken(
    name: str,
    place: str,
    change: Callable[[bytes], bytes],
    suffix: str,
    writer: str | None = None,
    also: tuple[str, ...] = (),
) -> Planted:
    """A train file that is no longer whole."""
    files = files_of(clean(), writer or suffix)
    files = {name.replace(writer or suffix, suffix): data for name, data in files.items()}
    files[f"train.{suffix}"] = change(files[f"train.{suffix}"])
    if suffix.endswith(".gz"):
        files |= {name: gzip.compress(data) for name, data in files.items() if not name.startswith("train")}
    return Planted(name, place, files, {"kind": "sequence_classification"}, count=None, also=also)


def replace_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines[number - 1] = change(lines[number - 1])
        return b"\n".join(lines)

    return apply


def tagged() -> Splits:
    chance, seen, splits = random.Random(7), set[str](), dict[str, list[Row]]()
    for split, count in SIZES.items():
        rows: list[Row] = []
        while len(rows) < count:
            words = [*chance.sample(FILLERS, 5), chance.choice(PEOPLE), "went", "to", chance.choice(CITIES)]
            if " ".join(words) not in seen:
                seen.add(" ".join(words))
                rows.append({"tokens": words, "tags": ["O"] * 5 + ["B-PER", "O", "O", "B-LOC"]})
        splits[split] = rows
    return splits


def tags(name: str, change: Callable[[Splits], object], place: str, **expected: Any) -> Planted:
    splits = tagged()
    change(splits)
    return Planted(name, place, files_of(splits, "conll"), {"kind": "token_classification"}, **expected)


def completions(name: str, task: dict[str, Any], place: str = "", **expected: Any) -> Planted:
    """Prompts and completions without a fault in the rows."""
    splits = clean()
    every(lambda _, row: {"prompt": row["text"], "completion": f" {row['label'][:0]}good film"})(splits)
    return Planted(name, place, files_of(splits), {"kind": "completion"} | task, backbone="llama", **expected)


def row_faults() -> dict[str, Planted]:
    """Faults of texts and labels, in rows that can be read."""
    line = "train.jsonl:7"
    return {
        "an empty text": planted("empty-text", set_text("")),
        "a text of white space": planted("empty-text", set_text(" \u00a0\t")),
        "a number for a text": planted("not-text", set_text(7)),
        "null for a text": planted("empty-text", set_text(None)),
        "NA as a text": planted("text-reads-as-missing", set_text("NA"), grave=False),
        "null as a text": planted("text-reads-as-missing", set_text("null"), grave=False),
        "None as a text": planted("text-reads-as-missing", set_text("None"), suffix="csv", grave=False),
        "a text as long as a book": planted("long-text", within(" " + "good" * 30_000), grave=False),
        "mojibake": planted("mojibake", within(" cafÃ©"), grave=False),
        "mojibake of quotes": planted("mojibake", within(" donâ€™t"), grave=False),
        "a replacement character": planted("replacement-character", within(" caf\ufffd"), grave=False),
        "a bell": planted("control-character", within(" \x07"), grave=False),
        "an escape": planted("control-character", within(" \x1b[31m"), suffix="tsv", grave=False),
        "a byte order mark inside": planted("byte-order-mark", within(" \ufeffgood"), grave=False),
        "no token": planted("no-tokens", set_text("\u00ad"), grave=False),
        "a missing label": planted("missing-label", set_label(None)),
        "an empty label": planted("missing-label", set_label(""), suffix="csv"),
        "an unknown label in test": planted("unknown-label", set_label("neutral", "test"), "test.jsonl:7"),
        "an unknown label in dev": planted("unknown-label", set_label("Positive", "dev"), "dev.jsonl:7"),
        "numbers and text": planted(
            "mixed-label-types", lambda s: (every(lambda i, r: r | {"label": str(i % 2)})(s), set_label(0)(s))
        ),
        "a typo in a label": planted("label-typo", set_label("postive")),
        "a label in another case": planted("label-typo", set_label("Positive")),
        "a label with a stroke": planted(
            "label-typo",
            lambda s: (every(lambda _, r: r | {"label": f"{r['label']}_mood"})(s), set_label("negative-mood")(s)),
        ),
        "None as a label": planted(
            "label-reads-as-missing",
            lambda s: [set_label("None", row=row)(s) for row in range(ROW, ROW + 8)],
            grave=False,
            count=8,
        ),
        "a label with one row": planted("rare-label", set_label("undecided"), grave=False),
        "a label without rows": planted(
            "absent-label",
            lambda s: None,
            "'neutral'",
            task={"labels": ["negative", "neutral", "positive"]},
            grave=False,
        ),
        "one label for nearly all": planted(
            "one-sided-labels",
            lambda s: every(lambda i, r: r | {"label": "negative" if i >= 3 else "positive"})(s),
            "95.0 %",
            grave=False,
            count=57,
            audit={"one_sided": 0.9},
        ),
        "a row twice": planted("duplicates", copy_row("train", 0, "train", ROW, label="negative"), grave=False),
        "a row twice but for white space": planted(
            "duplicates",
            lambda s: s["train"][ROW].update(text="  " + s["train"][0]["text"].replace(" ", "  "), label="negative"),
            grave=False,
        ),
        "a row of dev in train": planted(
            "overlap-dev",
            copy_row("train", 4, "dev", ROW, label="negative"),
            "dev.jsonl:7 = train.jsonl:5",
            grave=False,
        ),
        "a row of test in train": planted(
            "overlap-test",
            copy_row("train", 4, "test", ROW, label="negative"),
            "test.jsonl:7 = train.jsonl:5",
            grave=False,
        ),
        "a fifth of test in train": planted("overlap-test", many_overlaps, "test.jsonl:1 = train.jsonl:1", count=4),
        "a row of test in dev": planted(
            "overlap-dev-test",
            copy_row("dev", 4, "test", ROW, label="negative"),
            "test.jsonl:7 = dev.jsonl:5",
            grave=False,
        ),
        "two labels for a text": planted(
            "conflicting-labels",
            copy_row("train", 0, "train", ROW, label="positive"),
            line,
            grave=False,
            count=2,
            also=("duplicates",),
        ),
        "two labels for many texts": planted(
            "conflicting-labels",
            lambda s: [copy_row("train", row, "train", row + 31)(s) for row in range(4)],
            "train.jsonl:1",
            count=8,
            also=("duplicates",),
        ),
    }


def column_faults() -> dict[str, Planted]:
    """The wrong column, or fields in the wrong one."""
    return {
        "the wrong column as label": planted(
            "label-per-row", lambda s: None, "60 different values", task={"label": "id"}, count=60
        ),
        "text and label swapped": planted(
            "swapped-columns",
            lambda s: None,
            "'label' has a few",
            task={"text": "label", "label": "text"},
            count=60,
            also=("unknown-tokens",),
        ),
        "a row with text and label swapped": planted(
            "swapped-row", lambda s: s["train"][ROW].update(text="positive", label=s["train"][ROW]["text"])
        ),
        "a row shifted by one": planted(
            "shifted-row",
            lambda s: s["train"][ROW].update(id="negative", text="x", label="train6"),
            suffix="csv",
        ),
        "a header within": planted(
            "header-row", lambda s: s["train"][ROW].update(id="id", text="text", label="label"), suffix="tsv"
        ),
        "numbers as texts": planted(
            "numeric-text",
            every(lambda _, r: r | {"n": str(hash_of(r))}),
            "'n' holds numbers",
            task={"text": "n"},
            grave=False,
            also=("unknown-tokens",),
        ),
        "quotes around all texts": planted(
            "quoted-fields",
            every(lambda _, r: r | {"text": f'"{r["text"]}"'}),
            "train.tsv:2",
            "tsv",
            grave=False,
            count=60,
        ),
    }


def hash_of(row: Row) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(row["text"])) % 10**9


def file_faults() -> dict[str, Planted]:
    """Files that cannot be read."""
    extra = replace_line(8, lambda line: line + b",more")
    return {
        "latin-1 in UTF-8": broken(
            "refused", "train.tsv:8", replace_line(8, lambda x: x + "é".encode("latin-1")), "tsv"
        ),
        "a NUL byte": broken("refused", "train.tsv:8", replace_line(8, lambda x: x + b"\0"), "tsv"),
        "a NUL in an escape": broken(
            "refused", "train.jsonl:7", replace_line(7, lambda x: x.replace(b'"text": "', b'"text": "\\u0000')), "jsonl"
        ),
        "half a character": broken(
            "refused", "train.jsonl:7", replace_line(7, lambda x: x.replace(b'"text": "', b'"text": "\\ud83d')), "jsonl"
        ),
        "an extra comma": broken("refused", "train.csv:8", extra, "csv"),
        "a ragged row": broken("refused", "train.tsv:8", replace_line(8, lambda x: x.rpartition(b"\t")[0]), "tsv"),
        "an open quote": broken("refused", "train.csv:8", replace_line(8, lambda x: x.replace(b",", b',"', 1)), "csv"),
        "a JSON line cut in half": broken("refused", "train.jsonl:7", replace_line(7, lambda x: x[:20]), "jsonl"),
        "a JSON line that is no object": broken("refused", "train.jsonl:7", replace_line(7, lambda x: b"[1]"), "jsonl"),
        "a column twice": broken("refused", "train.csv:1", replace_line(1, lambda x: b"text,text,label"), "csv"),
        "a column without a name": broken("refused", "train.csv:1", replace_line(1, lambda x: b"id,,label"), "csv"),
        "a header alone": broken("refused", "train.csv:1", lambda x: x.split(b"\n")[0], "csv"),
        "an empty file": broken("refused", "train.csv:1", lambda x: b"", "csv"),
        "UTF-16": broken("refused", "train.csv:1", lambda x: x.decode().encode("utf-16"), "csv"),
        "half a gzip file": broken("refused", "train.csv.gz: ", lambda x: gzip.compress(x)[:99], "csv.gz", "csv"),
        "a row without the column": broken(
            "refused", "train.jsonl:7", replace_line(7, lambda x: x.replace(b'"label"', b'"lable"')), "jsonl"
        ),
        "one label in all rows": broken(
            "refused",
            "train.jsonl",
            lambda x: x.replace(b"negative", b"positive"),
            "jsonl",
            also=("one-sided-labels", "unknown-label"),
        ),
    }


def task_faults() -> dict[str, Planted]:
    """Faults that only a task or a tokenizer shows."""
    span = {
        "question": "who went",
        "context": "alice went to paris",
        "answers": {"text": ["rome"], "answer_start": [0]},
    }
    return {
        "another alphabet": planted(
            "unknown-tokens",
            every(lambda _, r: r | {"text": r["text"].translate({97: "я", 101: "ж", 105: "ы", 111: "ю", 117: "э"})}),
            "unknown to the vocabulary",
            grave=False,
            count=None,
        ),
        "a tag that train lacks": tags(
            "unknown-label", lambda s: s["test"][0]["tags"].__setitem__(5, "B-ORG"), "test.conll:1"
        ),
        "a tag misspelt": tags("label-typo", lambda s: s["train"][0]["tags"].__setitem__(5, "B-PRE"), "train.conll:1"),
        "a sentence with two taggings": tags(
            "conflicting-labels",
            lambda s: s["train"][1].update(tokens=list(s["train"][0]["tokens"]), tags=["O"] * 9),
            "train.conll:1",
            grave=False,
            count=2,
            also=("duplicates",),
        ),
        "a token without a tag": Planted(
            "refused",
            "train.conll:3",
            files_of(tagged(), "conll")
            | {"train.conll": replace_line(3, lambda x: x.split(b"\t")[0])(conll(tagged()["train"]))},
            {"kind": "token_classification"},
            count=None,
        ),
        "words that all have no token": tags(
            "all-masked",
            lambda s: [
                row.update(tokens=["\u00ad"] * 8 + [f"\u00ad{chr(0xAD) * i}"]) for i, row in enumerate(s["train"])
            ],
            "train.conll:1",
            count=60,
            also=("no-tokens",),
        ),
        "an end token that is never learnt": completions(
            "no-end-token", {"end_token": False}, "in none of 60", grave=False, count=60
        ),
        "padding and end are one token": completions("pad-is-end-token", {}, "</s>", grave=False, count=60),
        "rows that are cut": completions("truncated", {"max_length": 8}, "60 of 60 rows", grave=False, count=60),
        "an answer that is not in its context": Planted(
            "refused",
            "train.jsonl:7",
            files_of(
                {
                    split: [
                        span if split == "train" and index == ROW else answered(row["text"])
                        for index, row in enumerate(rows)
                    ]
                    for split, rows in clean().items()
                }
            ),
            {"kind": "question_answering", "max_answer_length": 3, "max_length": 32, "stride": 4},
            count=None,
        ),
        "turns out of order": chats(
            "turns out of order", [{"role": "assistant", "content": "good"}, {"role": "user", "content": "is it"}]
        ),
        "an unknown role": chats(
            "unknown role 'robot'", [{"role": "robot", "content": "good"}, {"role": "assistant", "content": "film"}]
        ),
        "no turn of the assistant": chats("no assistant turn", [{"role": "user", "content": "good film"}]),
        "no turn of the assistant in test": chats("", [{"role": "user", "content": "good film"}], "test"),
    }


def answered(text: str) -> Row:
    word = text.split()[0]
    return {"question": "what is first", "context": text, "answers": {"text": [word], "answer_start": [0]}}


def chats(reason: str, wrong: list[Row], split: str = "train") -> Planted:
    """Rows that are left out of train with a note, and refused elsewhere."""

    def chat(row: Row) -> Row:
        return {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "good film"}]}

    rows = {split: [chat(row) for row in rows] for split, rows in clean().items()}
    rows[split][ROW] = {"messages": wrong}
    task = {"kind": "chat", "template": "plain", "max_length": 200}
    dropped, grave = split == "train", split != "train"
    name, place = ("dropped", reason) if dropped else ("refused", f"{split}.jsonl:7")
    return Planted(name, place, files_of(rows), task, grave, 1 if dropped else None, backbone="bytes")


CORPUS = row_faults() | column_faults() | file_faults() | task_faults()


def byte_backbone(folder: Path) -> Path:
    """A Llama without weights whose tokenizer knows every byte, which chat templates need."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    LlamaConfig(vocab_size=len(letters), hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
    return folder


def write(planted: Planted, folder: Path, backbone: Path) -> Path:
    """The files, and a configuration of a run on them."""
    import yaml

    for name, data in planted.files.items():
        (folder / name).write_bytes(data)
    suffix = next(name for name in planted.files if name.startswith("train")).partition(".")[2]
    files = {split: f"{split}.{suffix}" for split in SIZES}
    config = {
        "backbone": {"name": str(backbone)},
        "task": {"data": files, "max_length": 32} | planted.task,
        "method": {"kind": "lora", "rank": 2},
        "training": {"learning_rate": 0.001, "max_steps": 1, "batch_size": 4},
        "audit": planted.audit,
        "output": {"folder": "run"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
