"""Runs of a few steps for tests that need many of them: of every task that is served, by several methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import entity_rows, sentiment_rows, write_jsonl

from peftkit.cli import main

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sentiment": ("sentiment", LORA),
    "other": ("sentiment", {"kind": "lora", "rank": 8, "targets": "query_value", "variant": "rslora"}),
    "mean": ("mean", LORA),
    "entities": ("entities", LORA),
    "answers": ("answers", LORA),
    "head": ("sentiment", {"kind": "head"}),
    "prefix": ("sentiment", {"kind": "prefix", "length": 3}),
    "prompt": ("sentiment", {"kind": "prompt", "length": 3}),
    "bottleneck": ("entities", {"kind": "bottleneck", "bottleneck_size": 4}),
    "dora": ("sentiment", LORA | {"variant": "dora"}),
    "writer": ("completion", LORA),
    "writer_two": ("completion", LORA | {"rank": 8}),
    "reader": ("sentiment on llama", LORA),
    "writer_prefix": ("completion", {"kind": "prefix", "length": 3}),
}
KINDS: dict[str, dict[str, Any]] = {
    "sentiment": {"kind": "sequence_classification"},
    "mean": {"kind": "sequence_classification", "pooling": "mean"},
    "entities": {"kind": "token_classification"},
    "answers": {"kind": "question_answering", "stride": 4},
    "completion": {"kind": "completion", "generation": {"max_new_tokens": 6}},
    "sentiment on llama": {"kind": "sequence_classification"},
}


def trained(root: Path, name: str, bert: Path, llama: Path) -> Path:
    """The folder of this run."""
    kind, method = RUNS[name]
    folder = root / name
    if (folder / "manifest.json").is_file():
        return folder
    on_llama = kind in ("completion", "sentiment on llama")
    files = {split: str(_file(root, kind, split, seed)) for seed, split in enumerate(("train", "dev", "test"))}
    tree = {
        "backbone": {"name": str(llama if on_llama else bert)},
        "task": KINDS[kind] | {"data": files, "max_length": 24},
        "method": method,
        # a rate at which a few steps change the answers of an adapter visibly
        "training": {"learning_rate": 0.02, "max_steps": 6, "batch_size": 8, "seed": sorted(RUNS).index(name)},
        "output": {"folder": str(folder)},
    }
    config = root / f"{name}.yaml"
    config.write_text(json.dumps(tree))
    assert main(["train", str(config)]) == 0
    return folder


def _file(root: Path, kind: str, split: str, seed: int) -> Path:
    file = root / f"{kind.split()[0]}_{split}.jsonl"
    if file.is_file():
        return file
    if kind == "entities":
        return write_jsonl(file, entity_rows(24, seed))
    rows = sentiment_rows(24, seed)
    if kind == "answers":
        rows = [
            {
                "question": "who was",
                "context": row["text"],
                "answers": {"text": [row["text"].split()[0]], "answer_start": [0]},
            }
            for row in rows
        ]
    if kind == "completion":
        rows = [{"prompt": row["text"], "completion": f" {row['text'].split()[0]} film"} for row in rows]
    return write_jsonl(file, rows)
