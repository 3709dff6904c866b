"""Time and memory of a LoRA step against length, batch, rank and width, beside what `peftkit plan` expects of them.

Texts are words that MiniLM's tokenizer has whole, so that every text has just so many tokens; backbones are BERTs of
random weights and six layers. One setting at a time leaves `BASE`. The command is `peftkit train` on sst2_lora.yaml.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import peftkit_arm
from benchmarks.speed.processes import run
from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import CONFIGS, made_backbone
from peftkit.environment import describe
from peftkit.errors import JobError

CONFIG = CONFIGS / "sst2_lora.yaml"
LAYERS = 6


@dataclass(frozen=True)
class Point:
    """A step that is measured."""

    length: int = 128
    batch: int = 16
    rank: int = 8
    width: int = 384

    @property
    def name(self) -> str:
        """Unique among points."""
        return f"length {self.length}, batch {self.batch}, rank {self.rank}, width {self.width}"


BASE = Point()
AXES: dict[str, Sequence[int]] = {
    "length": (32, 64, 128, 256, 512),
    "batch": (4, 8, 16, 32, 64),
    "rank": (1, 8, 32, 128),
    "width": (192, 384, 768),
}


def points() -> list[tuple[str, Point]]:
    """Every axis with its points."""
    return [(axis, replace(BASE, **{axis: value})) for axis, values in AXES.items() for value in values]


def scaling(steps: int, work: Path, results: Results) -> list[dict[str, Any]]:
    """Measure every point that is not done; returns the curves."""
    results.set("environment", describe())
    for _, point in points():
        if results.has(point.name, 0):
            continue
        overrides = settings(point, steps, work)
        figures = peftkit_arm.train(CONFIG, overrides)
        tokens = [point.batch * point.length] * steps
        if sum(tokens) != figures["tokens"]:
            raise JobError(f"{point.name}: there are {figures['tokens']:,} tokens, and {sum(tokens):,} were meant")
        times = peftkit_arm.step_seconds(figures.pop("mean_tokens_per_second"), tokens)
        expected = json.loads(run(["-m", "peftkit.cli", "plan", str(CONFIG), *overrides, "--json"]))
        figures |= {
            "step_seconds": times,
            "expected_step_seconds": expected["step_seconds"],
            "expected_bytes": expected["peak_bytes"],
        }
        results.put(point.name, 0, figures)
        tell(f"{point.name}: {median(times):.3f} s, {figures['growth_bytes'] / 2**20:,.0f} MiB")
    found = curves(results.kept["arms"])
    results.set("curves", found)
    return found


def curves(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each point of each axis."""
    rows = []
    for axis, point in points():
        one = arms[point.name]["0"]
        rows.append(
            {"axis": axis, "value": getattr(point, axis)}
            | asdict(point)
            | {
                "step_seconds": median(one["step_seconds"][1:]),
                "expected_step_seconds": one["expected_step_seconds"],
                "growth_bytes": one["growth_bytes"],
                "expected_bytes": one["expected_bytes"],
            }
        )
    return rows


def settings(point: Point, steps: int, work: Path) -> list[str]:
    """What of the configuration is set otherwise for a point."""
    backbone = made_backbone(work / f"width-{point.width}", point.width, LAYERS)
    data = texts(work / f"texts-{point.length}-{point.batch}-{steps}", backbone, point, steps)
    return [
        f"backbone.name={backbone}",
        f"task.data.train={data / 'train.jsonl'}",
        f"task.data.dev={data / 'dev.jsonl'}",
        "task.data.test=null",
        f"task.max_length={point.length}",
        f"method.rank={point.rank}",
        f"method.alpha={2 * point.rank}",
        "method.dropout=0.1",
        f"training.batch_size={point.batch}",
        f"training.micro_batch_size={point.batch}",
        f"training.max_steps={steps}",
        f"training.evaluate_every={steps}",
    ]


def texts(folder: Path, backbone: Path, point: Point, steps: int) -> Path:
    """Rows of `point.length` tokens each, the ends that the tokenizer adds among them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    whole = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if word.isascii()]
    words = [word for word in whole if word.isalpha() and word.islower() and len(word) > 3][:1000]
    chance = random.Random(f"{point.length}/{point.batch}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in {"train": steps * point.batch, "dev": 4}.items():
        rows = [
            {"sentence": " ".join(chance.choices(words, k=point.length - 2)), "label": str(number % 2)}
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
