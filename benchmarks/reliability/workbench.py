"""The tiny backbone, the data and the two programs that the experiments run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from benchmarks import tiny_bert
from benchmarks.reliability import stock
from benchmarks.reliability.forks import Forks
from peftkit.disk import file_sha256

GOOD_WORDS, BAD_WORDS = ("good", "great", "fine", "happy", "bright"), ("bad", "awful", "poor", "sad", "dark")
FILLERS = ("the", "a", "film", "story", "actor", "music", "was", "is", "and", "very", "quite")
ROWS = {"train": 60, "dev": 8, "test": 8}
STEPS, EVERY = 12, 3
"""Steps of a run, and between two of its checkpoints; an epoch has 4, so that some are of both."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all", "dropout": 0.1},
    "adalora": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "alpha": 8, "allocate_every": 1},
    "bottleneck": {"kind": "bottleneck", "placement": "parallel", "bottleneck_size": 8},
    "prefix": {"kind": "prefix", "length": 4, "reparametrization_size": 8},
    "full": {"kind": "full"},
}


@dataclass(frozen=True)
class Made:
    """What a run that ended left: what must be the same, whatever happened to it."""

    losses: tuple[tuple[int, str], ...]
    """Step and loss of every step, the loss as hexadecimal digits."""
    files: dict[str, str]
    """File → sha256, of the trained weights and, where there are, the predictions and scores."""


@dataclass
class Program:
    """One column's training program."""

    column: str
    folder: Path
    """For its own files."""
    configs: dict[str, Path]
    """Method → configuration."""
    _forks: list[Forks] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)

    def offers(self, method: str) -> bool:
        """Whether the column has the method."""
        return method in self.configs

    def arguments(self, method: str, run: Path) -> list[str]:
        """The command line, which is given again to go on."""
        if self.column == "peftkit":
            return ["train", str(self.configs[method]), f"output.folder={run}"]
        return [str(self.configs[method]), f"output={run}"]

    @property
    def forks(self) -> Forks:
        """The process that forks, started when it is first asked for."""
        if not self._forks:
            first = self.arguments("lora", self.folder / "first")
            self._forks.append(Forks(self.column, first, self.folder / "forks.log"))
        return self._forks[0]

    def whole(self, method: str) -> Path:
        """A finished run that nothing happened to; trained once."""
        run = self.folder / f"whole-{method}"
        if not run.exists():
            forks = self.forks
            began = time.monotonic()
            code = forks.run(self.arguments(method, run), self.said)
            self._seconds[method] = time.monotonic() - began
            if code:
                raise RuntimeError(f"{self.column} cannot train {method}: {self.said.read_text()[-2000:]}")
        return run

    def seconds(self, method: str) -> float:
        """What `whole` took, to draw moments from."""
        self.whole(method)
        return self._seconds[method]

    @property
    def said(self) -> Path:
        """What its runs that nothing happens to say."""
        return self.folder / "said.txt"

    def finished(self, run: Path) -> bool:
        """Whether a run is over: what it writes last is there."""
        return (run / ("manifest.json" if self.column == "peftkit" else "losses.json")).is_file()

    def made(self, run: Path) -> Made:
        """What a finished run left.

        Raises:
            OSError, ValueError: it is not finished.
        """
        if self.column == "peftkit":
            events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
            files = [*run.glob("*/*.safetensors"), run / "predictions.jsonl", run / "scores.json"]
        else:
            losses = json.loads((run / "losses.json").read_text(encoding="utf-8"))
            files = sorted((run / "final").glob("*.safetensors"))
        files = [file for file in files if not file.is_relative_to(run / "checkpoints")]
        hashes = {str(file.relative_to(run)): file_sha256(file) for file in files}
        return Made(tuple((step, float(loss).hex()) for step, loss in losses), hashes)

    def checkpoints(self, run: Path) -> list[Path]:
        """The folders of its checkpoints, oldest first; not those that are being written."""
        names = "checkpoints/step-*" if self.column == "peftkit" else "checkpoint-*"
        return sorted(run.glob(names), key=lambda folder: int(folder.name.rpartition("-")[2]))

    def close(self) -> None:
        """End the process that forks."""
        for one in self._forks:
            one.close()


class Workbench:
    """What the experiments share; a context, whose end ends the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs: dict[str, Program] = {}

    def program(self, column: str) -> Program:
        """The program of a column."""
        if column not in self._programs:
            own = self.folder / column
            own.mkdir()
            make = self._peftkit_configs if column == "peftkit" else self._stock_configs
            self._programs[column] = Program(column, own, make(own))
        return self._programs[column]

    @cached_property
    def backbone(self) -> Path:
        """A random BERT of 2 layers and 32 units."""
        return tiny_bert.make(
            self.folder / "backbone",
            [*GOOD_WORDS, *BAD_WORDS, *FILLERS],
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.2,
        )

    @cached_property
    def data(self) -> dict[str, str]:
        """Split → file of sentences whose label is told by one word."""
        files = {}
        for split, count in ROWS.items():
            chance = random.Random(split)
            file = self.folder / f"{split}.jsonl"
            file.write_text("".join(json.dumps(_row(chance)) + "\n" for _ in range(count)), encoding="utf-8")
            files[split] = str(file)
        return files

    def peftkit_config(self, method: dict[str, Any], **training: Any) -> dict[str, Any]:
        """A configuration, as nested sections; `training` adds to the training's."""
        settings = {"learning_rate": 0.002 if method["kind"] == "full" else 0.01, "max_steps": STEPS, "batch_size": 15}
        settings |= {"checkpoint_every": EVERY, "seed": 1}
        return {
            "backbone": {"name": str(self.backbone), "dropout": 0.1},
            "task": {"kind": "sequence_classification", "data": self.data, "max_length": 32},
            "method": method,
            "training": settings | training,
            "audit": {"overlap": 1.0},
        }

    def __enter__(self) -> Workbench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for program in self._programs.values():
            program.close()

    def _peftkit_configs(self, folder: Path) -> dict[str, Path]:
        configs = {name: folder / f"{name}.yaml" for name in METHODS}
        for name, file in configs.items():
            file.write_text(yaml.safe_dump(self.peftkit_config(METHODS[name])), encoding="utf-8")
        return configs

    def _stock_configs(self, folder: Path) -> dict[str, Path]:
        configs = {name: folder / f"{name}.json" for name in stock.METHODS}
        for name, file in configs.items():
            config: dict[str, Any] = {"backbone": str(self.backbone), "train": self.data["train"], "method": name}
            config |= {"output": str(folder / name), "learning_rate": 0.002 if name == "full" else 0.01, "seed": 1}
            config |= {"max_steps": STEPS, "per_device_train_batch_size": 15, "save_steps": EVERY}
            file.write_text(json.dumps(config), encoding="utf-8")
        return configs


def differing(made: Made, expected: Made) -> list[str]:
    """The names of what differs: files, and `losses`."""
    names = sorted(made.files.keys() | expected.files.keys())
    files = [name for name in names if made.files.get(name) != expected.files.get(name)]
    return files if made.losses == expected.losses else ["losses", *files]


def _row(chance: random.Random) -> dict[str, str]:
    label: str = chance.choice(["negative", "positive"])
    words: Sequence[str] = chance.choices(FILLERS, k=chance.randint(2, 9))
    told = chance.choice(GOOD_WORDS if label == "positive" else BAD_WORDS)
    place = chance.randrange(len(words))
    return {"text": " ".join([*words[:place], told, *words[place:]]), "label": label}
