"""Data files of every format with changes, through `peftkit audit` and what prepares training."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzzing import backbone
from benchmarks.fuzzing.mutations import changed_bytes, changed_tree
from benchmarks.fuzzing.watch import Finding, told, watched

Rows = list[dict[str, Any]]
Example = tuple[str, str, bytes]
"""Task, suffix of its train file, and that file's bytes."""
SENTENCES = [{"text": f"{word} film {n}", "label": word} for n in range(4) for word in ("good", "bad")]
TAGGED = [{"tokens": ["alice", "went", "to", "rome"], "tags": ["B-PER", "O", "O", "B-LOC"]} for _ in range(4)]
QUESTIONS = [
    {"id": "1", "question": "who", "context": "alice went", "answers": {"text": ["alice"], "answer_start": [0]}}
    for _ in range(4)
]
RELATIONS = [
    {"text": "<e1>alice</e1> met <e2>bob</e2>", "label": label} for _ in range(4) for label in ("met(e1,e2)", "Other")
]
CHATS = [
    {"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]} for _ in range(4)
]
SQUAD = {
    "version": "2.0",
    "data": [{"title": "t", "paragraphs": [{"context": "alice went", "qas": [
        {"id": "1", "question": "who", "is_impossible": False, "answers": [{"text": "alice", "answer_start": 0}]}
    ]}]}],
}  # fmt: skip
NUMBERS = [{"text": f"film {n}", "label": n / 4} for n in range(8)]
LABEL_SETS = [{"text": f"film {n}", "label": ["good", "bad"][: n % 3]} for n in range(8)]
PAIRS = [{"source": f"film {n}", "target": f"movie {n}"} for n in range(8)]
PROMPTS = [{"prompt": f"film {n}", "completion": f"movie {n}"} for n in range(8)]
LINES = [{"text": f"film {n} went"} for n in range(8)]
CLASSES = "sequence_classification"
TASKS: Mapping[str, tuple[dict[str, Any], Any]] = {
    "classes": ({"kind": CLASSES}, SENTENCES),
    "numbers": ({"kind": CLASSES, "problem": "regression"}, NUMBERS),
    "label sets": ({"kind": CLASSES, "problem": "multi_label"}, LABEL_SETS),
    "tags": ({"kind": "token_classification"}, TAGGED),
    "spans": ({"kind": "question_answering", "max_answer_length": 3, "stride": 4}, QUESTIONS),
    "relations": ({"kind": "relation_extraction"}, RELATIONS),
    "chats": ({"kind": "chat", "template": "plain"}, CHATS),
    "pairs": ({"kind": "seq2seq", "max_target_length": 16}, PAIRS),
    "prompts": ({"kind": "completion"}, PROMPTS),
    "lines": ({"kind": "plain_text", "objective": "masked"}, LINES),
}
TABLES = ("csv", "tsv", "tab")
TREES = ("json", "jsonl", "jsonl.gz", "parquet")
# fmt: off
TEXTUAL = (
    '"', "'", ",", "\t", "\n", "\r", "\r\n", "\n\n", "{", "}", "[", "]", ":", "null", "NaN", "1e999", "\\u0000", "#",
    "\\ud800", "\0", "\ufeff", "\u2028", "\x85", "-DOCSTART-", "\tO\n", " B-X\n", "class", "meta", "\x1a",
)
# fmt: on
TOKENS = (*(one.encode() for one in TEXTUAL), b"\xff", b"\xed\xa0\x80", b"\xff\xfe", b"PAR1", b"\x1f\x8b")


class Data:
    """Train files beside sound dev and test files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._backbone = backbone.make(folder / "backbone")

    def examples(self) -> st.SearchStrategy[Example]:
        return _examples()

    def check(self, example: Example) -> bool:
        """Examine one file; returns whether it could be trained on."""
        task, suffix, content = example
        train = self._folder / f"train.{suffix}"
        train.write_bytes(content)
        config = self._config(task, train)
        with watched():
            told(["audit", str(config), "--json"])
            return _prepared(config)

    def _config(self, task: str, train: Path) -> Path:
        settings, rows = TASKS[task]
        dev = self._folder / f"{task}.jsonl"
        if not dev.exists():
            dev.write_bytes(_jsonl(rows))
        config = {
            "backbone": {"name": str(self._backbone)},
            "task": {"data": {"train": str(train), "dev": str(dev)}, "max_length": 32} | settings,
            "method": {"kind": "lora"},
            "training": {"learning_rate": 0.01},
        }
        file = self._folder / "config.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
        return file


def _prepared(config: Path) -> bool:
    """What `peftkit train` does before it loads weights."""
    from peftkit.config import load_run
    from peftkit.errors import PeftkitError
    from peftkit.prepare import prepare

    try:
        if not prepare(load_run(config)).train.encoded.examples:
            raise Finding("nothing to train on, without an error")
    except PeftkitError as error:
        if not str(error).strip():
            raise Finding("an error without a word") from error
        return False
    return True


@st.composite
def _examples(draw: st.DrawFn) -> Example:
    task = draw(st.sampled_from(sorted(TASKS)))
    rows: Any = TASKS[task][1]
    flat = task not in ("tags", "spans", "chats", "label sets")
    extra = ("txt",) if task == "lines" else TABLES if flat else ("conll",) if task == "tags" else ()
    suffix = draw(st.sampled_from((*TREES, *extra, *extra)))
    if task == "spans" and suffix == "json" and draw(st.booleans()):
        rows = SQUAD
    how = draw(st.sampled_from(("tree", "tree", "bytes", "bytes", "both", "random")))
    if how == "random":
        return task, suffix, draw(st.binary(max_size=300))
    if how in ("tree", "both"):
        rows = changed_tree(draw, rows, nested=20 if suffix == "parquet" else 3000)
    content = _written(suffix, rows)
    if how in ("bytes", "both"):
        content = changed_bytes(draw, content, TOKENS)
    return task, suffix, content


def _written(suffix: str, rows: Any) -> bytes:
    """Rows, or what has become of them, in a format; where that cannot hold them, in JSON."""
    writers: dict[str, Callable[[Any], bytes]] = {
        "json": lambda rows: json.dumps(rows).encode(),
        "jsonl": _jsonl,
        "jsonl.gz": lambda rows: gzip.compress(_jsonl(rows), mtime=0),
        "parquet": _parquet,
        "conll": _conll,
        "tab": lambda rows: _table("\t")(rows).replace(b"\n", b"\nd\td\n\tclass\n", 1),
        "txt": lambda rows: "\n\n".join(row["text"] for row in rows).encode(),
        "csv": _table(","),
        "tsv": _table("\t"),
    }
    for write in (writers[suffix], writers["json"]):
        with contextlib.suppress(Exception):  # whatever a writer says of what has become of the rows
            return write(rows)
    return b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}"  # nested deeper than Python's writer goes


def _jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(separator: str) -> Callable[[Any], bytes]:
    def write(rows: Any) -> bytes:
        text = io.StringIO()
        table = csv.writer(text, delimiter=separator, lineterminator="\n")
        table.writerow(rows[0])
        table.writerows(row.values() for row in rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    return write


def _conll(rows: Any) -> bytes:
    blocks = ("".join(f"{w}\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=False)) for row in rows)
    return "\n".join(blocks).encode("utf-8", "surrogatepass")


def _parquet(rows: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()
