"""What was measured of a workload, kept as soon as it is known, so that nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from peftkit.disk import write_text
from peftkit.errors import UsageError

RESULTS = Path(__file__).parents[1] / "results" / "speed"


class Results:
    """The file of one workload: `asked`, `environment`, `rates` of each round, figures of each arm by round.

    Args:
        asked: what decides the figures; a file of something else is not gone on with.

    Raises:
        UsageError: the file is of other settings.
    """

    def __init__(self, file: Path, asked: dict[str, Any]) -> None:
        self.file = file
        self.kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        before = self.kept.setdefault("asked", asked)
        if before != asked:
            differing = ", ".join(sorted(name for name in before | asked if before.get(name) != asked.get(name)))
            raise UsageError(f"{file} was measured with another {differing}: give that again, or remove the file")

    def has(self, arm: str, number: int) -> bool:
        """Whether round `number` of an arm is done."""
        return str(number) in self.kept.get("arms", {}).get(arm, {})

    def put(self, arm: str, number: int, figures: dict[str, Any]) -> None:
        """Keep the figures of an arm."""
        self.kept.setdefault("arms", {}).setdefault(arm, {})[str(number)] = figures
        self.kept.get("missing", {}).pop(arm, None)
        self.write()

    def miss(self, arm: str, why: str) -> None:
        """Keep why an arm could not be measured."""
        self.kept.setdefault("missing", {})[arm] = why
        self.write()

    def set(self, name: str, value: Any) -> None:
        """Keep something else."""
        self.kept[name] = value
        self.write()

    def write(self) -> None:
        """Write the whole file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self.kept, indent=1) + "\n")


def steady_rate(figures: dict[str, Any]) -> float:
    """Real tokens a second, without the first step, which sets things up."""
    first = 1 if len(figures["step_seconds"]) > 1 else 0
    return float(sum(figures["step_tokens"][first:]) / sum(figures["step_seconds"][first:]))


def medians(kept: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each arm: `tokens_per_second`, `step_seconds`, `growth_bytes`, `peak_bytes`, over rounds, and `rounds`."""
    found = {}
    for arm, rounds in kept.get("arms", {}).items():
        taken = list(rounds.values())
        found[arm] = {
            "tokens_per_second": median(map(steady_rate, taken)),
            "step_seconds": median(median(one["step_seconds"][1:] or one["step_seconds"]) for one in taken),
            "growth_bytes": median(one["growth_bytes"] for one in taken),
            "peak_bytes": median(one["peak_bytes"] for one in taken),
            "rounds": len(taken),
        }
    return found
