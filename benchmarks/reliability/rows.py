"""The trials of one experiment: done one after the other, kept line by line, and counted."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.reliability import COLUMNS
from benchmarks.reliability.workbench import Workbench
from peftkit.environment import describe


class Rows:
    """What is known of an experiment's trials; `file` holds one JSON object for each that is done."""

    def __init__(self, file: Path, experiment: ModuleType, tier: str, fresh: bool = False) -> None:
        self.file, self.experiment, self.tier = file, experiment, tier
        file.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            file.unlink(missing_ok=True)
        self.trials = experiment.trials(tier)
        wanted = set(self.trials)
        self.done = [row for row in _lines(file) if row["trial"] in wanted]

    def complete(self, columns: Sequence[str], bench: Workbench) -> None:
        """Do the trials that are not done, and write the summary; nothing where the machine lacks what they need."""
        if reason := getattr(self.experiment, "missing", str)():
            print(f"{self.file.stem}: {reason}; nothing is tried", file=sys.stderr, flush=True)
            return
        known = {(row["trial"], row["column"]) for row in self.done}
        for trial in self.trials:
            for column in columns:
                if column in self._columns() and (trial, column) not in known:
                    self._add(self._tried(trial, column, bench))
        document = {
            "command": " ".join(["python -m benchmarks.reliability", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "tier": self.tier,
            "environment": describe(),
        } | {column: self.counted(column) for column in self._columns()}
        self.file.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @property
    def bad(self) -> list[dict[str, Any]]:
        """Trials of peftkit that went otherwise than they must."""
        return [row for row in self._of("peftkit") if row["outcome"] not in self.experiment.GOOD]

    def counted(self, column: str) -> dict[str, Any]:
        """Trials and outcomes of a column, with the experiment's own figures."""
        rows = self._of(column)
        counts: dict[str, Any] = {"trials": len(rows), "outcomes": dict(Counter(row["outcome"] for row in rows))}
        figures = getattr(self.experiment, "figures", None)
        return counts | (figures(rows) if figures and rows else {})

    def summary(self) -> str:
        """One line a column."""
        return "\n".join(f"{self.file.stem} {column}: {self.counted(column)}" for column in self._columns())

    def _tried(self, trial: str, column: str, bench: Workbench) -> dict[str, Any]:
        folder = bench.folder / "trial"
        folder.mkdir()
        began = time.monotonic()
        try:
            found = self.experiment.run(trial, column, bench, folder)
        finally:
            shutil.rmtree(folder)
        return (
            {"trial": trial, "column": column}
            | _without_places(found, bench)
            | {"seconds": round(time.monotonic() - began, 2)}
        )

    def _add(self, row: dict[str, Any]) -> None:
        self.done.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{self.file.stem} {row['trial']} {row['column']}: {row['outcome']}", file=sys.stderr, flush=True)

    def _of(self, column: str) -> list[dict[str, Any]]:
        return [row for row in self.done if row["column"] == column]

    def _columns(self) -> Sequence[str]:
        return getattr(self.experiment, "COLUMNS", COLUMNS)


def _without_places(found: dict[str, Any], bench: Workbench) -> dict[str, Any]:
    """What was found, with the folders of this machine as `.`."""
    text = json.dumps(found)
    for place in (bench.folder, Path.cwd()):
        text = text.replace(str(place), ".")
    told: dict[str, Any] = json.loads(text)
    return told


def _lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines; a command that was killed may have left half of one, which is cut off."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
