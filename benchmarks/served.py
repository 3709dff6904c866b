"""A service over small runs on one backbone, for the benchmarks that put it under load or feed it nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PEOPLE = ["alice", "bob", "carol"]
CITIES = ["paris", "london", "berlin", "rome"]
GOOD = ["good", "great", "fine", "happy"]
BAD = ["bad", "awful", "poor", "sad", "dark"]
FILLERS = ["the", "a", "film", "story", "music", "was", "is", "and", "very", "went", "to"]
TRADE = ["ship", "oil", "price", "share", "bank", "trade", "crude", "profit", "loss", "quarter"]
WORDS = [*PEOPLE, *CITIES, *GOOD, *BAD, *FILLERS, *TRADE]
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sentiment": ("text", {"kind": "lora", "rank": 8}),
    "sentiment_small": ("text", {"kind": "lora", "rank": 2, "targets": "query_value"}),
    "sentiment_mean": ("mean", {"kind": "lora", "rank": 8}),
    "sentiment_rslora": ("text", {"kind": "lora", "rank": 16, "variant": "rslora"}),
    "sentiment_head": ("text", {"kind": "head"}),
    "entities": ("words", {"kind": "lora", "rank": 8}),
    "entities_small": ("words", {"kind": "lora", "rank": 4, "targets": "attention"}),
    "answers": ("answers", {"kind": "lora", "rank": 8}),
}
"""On an encoder: name, kind of rows, and method of each; all of them can share a batch."""
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stories": ("prompts", {"kind": "lora", "rank": 8}),
    "stories_small": ("prompts", {"kind": "lora", "rank": 2, "targets": "query_value"}),
    "stories_prefix": ("prompts", {"kind": "prefix", "length": 4}),
    "talk": ("messages", {"kind": "lora", "rank": 8}),
    "reader": ("text", {"kind": "lora", "rank": 8}),
}
"""The same on a decoder: texts that follow prompts, conversations, and one that only reads."""


def make_runs(
    folder: Path, backbone: str, steps: int, runs: Mapping[str, tuple[str, dict[str, Any]]] = RUNS
) -> dict[str, Path]:
    """Train the runs for a few steps, where they are not there yet; a service need not know much."""
    found: dict[str, Path] = {}
    for name, (rows, method) in runs.items():
        found[name] = folder / name
        if (found[name] / "manifest.json").is_file():
            continue
        tree = {
            "backbone": {"name": backbone},
            "task": _task(folder, rows),
            "method": method,
            "training": {"learning_rate": 1e-3, "max_steps": steps, "batch_size": 16},
            "output": {"folder": str(found[name]), "overwrite": True},
        }
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(tree), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "peftkit.cli", "train", str(config)],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600,
        )
    return found


@contextlib.contextmanager
def served(runs: dict[str, Path], log: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A service in a process of its own; gives its address and process id."""
    command = [sys.executable, "-m", "peftkit.cli", "serve", *(f"{name}={run}" for name, run in runs.items())]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "--port", "0", *options], stdout=stream, stderr=stream)
        try:
            yield _address(process, log), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    if code:
        raise SystemExit(f"the service ended with {code}; {log} says why")


def sentences(count: int, seed: int, shortest: int = 4, longest: int = 40) -> list[str]:
    """Texts of known words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]


def question(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """The body of a request to a run."""
    asked: dict[str, Any] = {"texts": list(texts)}
    return asked | {"pairs": ["alice went to paris and bob to rome"] * len(texts)} if name == "answers" else asked


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"http://\S+", log.read_text()):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{found[0]}/ready", timeout=5):
                return found[0]
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"the service did not start; {log} says why")


def _task(folder: Path, rows: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    settings, make = _kinds()[rows]
    files = {split: folder / f"{settings['kind']}_{split}.jsonl" for split in ("train", "dev", "test")}
    for seed, file in enumerate(files.values()):
        lines = [json.dumps(make(random.Random(f"{seed} {index}"))) for index in range(64)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"max_length": 64} | settings | {"data": {split: str(file) for split, file in files.items()}}


def _kinds() -> dict[str, tuple[dict[str, Any], Callable[[random.Random], dict[str, Any]]]]:
    """By the kind of rows: settings of the task, and how a row is drawn."""
    writing = {"generation": {"max_new_tokens": 12}, "max_length": 256}  # their backbone reads bytes
    return {
        "text": ({"kind": "sequence_classification"}, _labelled),
        "mean": ({"kind": "sequence_classification", "pooling": "mean"}, _labelled),
        "words": ({"kind": "token_classification"}, _tagged),
        "answers": ({"kind": "question_answering", "stride": 16}, _answered),
        "prompts": ({"kind": "completion"} | writing, _continued),
        "messages": ({"kind": "chat", "template": "plain"} | writing, _talked),
    }


def _labelled(chance: random.Random) -> dict[str, Any]:
    label = chance.choice(("negative", "positive"))
    words = [*chance.choices(FILLERS, k=chance.randint(3, 9)), chance.choice(GOOD if label == "positive" else BAD)]
    return {"text": " ".join(chance.sample(words, len(words))), "label": label}


def _tagged(chance: random.Random) -> dict[str, Any]:
    words = [chance.choice(PEOPLE), "went", "to", chance.choice(CITIES), *chance.choices(FILLERS, k=3)]
    return {"tokens": words, "tags": ["B-PER", "O", "O", "B-LOC", "O", "O", "O"]}


def _answered(chance: random.Random) -> dict[str, Any]:
    who, where, rest = chance.choice(PEOPLE), chance.choice(CITIES), " ".join(chance.choices(FILLERS, k=4))
    context = f"{rest} {who} went to {where}"
    return {
        "question": f"where is {who}",
        "context": context,
        "answers": {"text": [where], "answer_start": [context.rindex(where)]},
    }


def _continued(chance: random.Random) -> dict[str, Any]:
    first, *rest = _labelled(chance)["text"].split()
    return {"prompt": first, "completion": f" {' '.join(rest)}"}


def _talked(chance: random.Random) -> dict[str, Any]:
    asked, answered = (str(_labelled(chance)["text"]) for _ in range(2))
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def environment_threads() -> dict[str, str]:
    """What decides how many threads torch takes."""
    return {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
