"""Results of a comparison that never ran, for tests and measurements of what reads them: every figure is made up."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.bench.store import ANSWERS, RUNS, Answers, Cost, Forgetting, Key, Record, Score

ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.2",
    "platform": "Linux",
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "gpus": [],
    "cuda": None,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Method:
    """What is true of a made-up method."""

    name: str
    accuracy: float
    parameters: int = 100_000
    best_rate: float = 1e-3
    seconds: float = 60.0
    merges: bool = True


METHODS = (
    Method("full", 0.905, 22_000_000, 1e-4, 180.0, False),
    Method("lora", 0.902, 300_000, 1e-3, 90.0),
    Method("adalora", 0.899, 310_000, 1e-3, 110.0),
    Method("pfeiffer", 0.898, 620_000, 3e-4, 85.0, False),
    Method("prefix", 0.871, 150_000, 3e-3, 80.0, False),
    Method("head", 0.801, 800, 3e-3, 30.0, False),
)


@dataclass(frozen=True)
class Made:
    """A grid of made-up results."""

    methods: Sequence[Method] = METHODS
    backbones: Sequence[str] = ("minilm",)
    data: Sequence[str] = ("sst2", "tweet_emotion")
    budgets: Sequence[str] = ("all",)
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    rates: Sequence[float] = RATES
    examples: int = 800
    rows_in_common: float = 0.7
    """How much of what makes an example hard is the same for all methods and seeds."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of every record."""

    def runs(self) -> Iterable[tuple[Record, Answers | None]]:
        """Every run: trials, then final runs, cell by cell."""
        for backbone in self.backbones:
            for place, data in enumerate(self.data):
                for at, budget in enumerate(self.budgets):
                    random = np.random.default_rng([len(backbone), place, at])
                    hardness = random.normal(size=self.examples)
                    for method in self.methods:
                        names = {"grid": "made", "backbone": backbone, "data": data, "budget": budget}
                        yield from self._cell(names | {"method": method.name}, method, hardness, random)

    def _cell(
        self, names: dict[str, str], method: Method, hardness: Any, random: np.random.Generator
    ) -> Iterable[tuple[Record, Answers | None]]:
        for rate in self.rates:
            dev = method.accuracy - 0.02 * abs(np.log10(rate / method.best_rate))
            yield self._record(names, method, "trial", 0, rate, dev=_accuracy(dev)), None
        for seed in self.seeds:
            luck = self.rows_in_common * hardness + np.sqrt(1 - self.rows_in_common**2) * random.normal(
                size=self.examples
            )
            skill = method.accuracy + 0.004 * random.normal()
            right = luck > np.quantile(luck, 1 - min(0.999, skill))
            answers = Answers(
                predictions=tuple(right.astype(int).tolist()),
                numerators=tuple(right.astype(float).tolist()),
                denominators=(1.0,) * self.examples,
            )
            test = float(right.mean())
            more = self._finished(method, test, seed, random)
            yield self._record(names, method, "final", seed, method.best_rate, test=_accuracy(test), **more), answers

    def _finished(self, method: Method, test: float, seed: int, random: np.random.Generator) -> dict[str, Any]:
        steps = range(50, 501, 50)
        learnt = [(step, test - 0.3 * float(np.exp(-step / 120)) + 0.003 * random.normal()) for step in steps]
        forgot = 0.05 * np.log10(method.parameters) / 7
        return {
            "dev": _accuracy(test + 0.005),
            "best_step": 500,
            "curve": tuple(learnt),
            "losses": tuple((step, 0.2 + float(np.exp(-step / 100))) for step in steps),
            "majority": _accuracy(0.509),
            "untuned": _accuracy(0.49 + 0.01 * seed) if method.name == "full" else None,
            "merged": _accuracy(test) if method.merges else None,
            "merged_answers_changed": 0 if method.merges else None,
            "robustness": {"typos": _accuracy(test - 0.06), "word swaps": _accuracy(test - 0.03)},
            "forgetting": Forgetting(probe="trec", before=0.80, after=0.80 - forgot + 0.002 * random.normal()),
        }

    def _record(self, names: dict[str, str], method: Method, phase: str, seed: int, rate: float, **more: Any) -> Record:
        key = Key(**names, phase=phase, seed=seed, learning_rate=rate)  # type: ignore[arg-type]
        fields: dict[str, Any] = {
            "id": sha256(key.model_dump_json().encode()).hexdigest()[:16],
            "key": key,
            "status": "finished",
            "trainable_parameters": method.parameters,
            "head_parameters": 770,
            "total_parameters": 22_700_000,
            "saved_parameters": method.parameters,
            "artifact_bytes": 4 * method.parameters,
            "cost": Cost(
                seconds=method.seconds + seed,
                steps=500,
                tokens=400_000,
                tokens_per_second=400_000 / method.seconds,
                evaluation_seconds=4.0,
                evaluation_rows=self.examples,
                peak_memory_bytes=2**29 + 12 * method.parameters,
                memory_growth_bytes=2**27 + 12 * method.parameters,
            ),
            "data_sha256": f"{names['data']}-{names['budget']}-{seed}",
            "code": "c0de" * 16,
            "environment": ENVIRONMENT,
        }
        return Record(**fields | more | self.changes)


def write(folder: Path, runs: Iterable[tuple[Record, Answers | None]]) -> int:
    """Files as `Store.add` writes them, without waiting for the disk after each; returns how many runs."""
    for name in (RUNS, ANSWERS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    count = 0
    for record, answers in runs:
        if answers is not None:
            packed = gzip.compress(answers.model_dump_json().encode(), 1, mtime=0)
            (folder / ANSWERS / f"{record.id}.json.gz").write_bytes(packed)
        (folder / RUNS / f"{record.id}.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        count += 1
    return count


def _accuracy(value: float) -> Score:
    return Score(headline="accuracy", value=float(value), values={"accuracy": float(value)})
