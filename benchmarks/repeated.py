"""Whether runs come to the same on another machine: published runs beside the same runs made again elsewhere.

    python -m benchmarks.repeated FOLDER

FOLDER holds results of `peftkit bench run` in which runs of benchmarks/results/main, by their ids, were made again.
What differs goes to results/repeated.json, from which `python -m benchmarks.published` tells README's readers whether
runs of two machines may stand in one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from peftkit.bench.provenance import described
from peftkit.bench.store import Record, Store
from peftkit.errors import UsageError

HERE = Path(__file__).parent / "results"
RESULT = HERE / "repeated.json"
COMMAND = "python -m benchmarks.repeated FOLDER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    found = compared(Store(HERE / "main"), Store(parser.parse_args().folder))
    RESULT.write_text(json.dumps({"command": COMMAND} | found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "runs"}, indent=1))


def compared(published: Store, repeated: Store) -> dict[str, Any]:
    """Test scores and answers of the runs that both folders hold, made on different machines.

    Raises:
        UsageError: there are none.
    """
    pairs = [(one, other) for one in repeated.records() if (other := published.find(one.id)) and _differ(one, other)]
    if not pairs:
        raise UsageError(f"{repeated.folder} repeats no scored run of {published.folder} on another machine")
    rows = [_row(other, one, published, repeated) for one, other in pairs]
    differences = [row["repeated"] - row["published"] for row in rows]
    return {
        "processors": sorted({_processor(one) for pair in pairs for one in pair}),
        "count": len(rows),
        "mean_difference": statistics.mean(differences),
        "largest_difference": max(map(abs, differences)),
        "answers_changed": sum(row["answers_changed"] for row in rows) / sum(row["answers"] for row in rows),
        "spread_over_seeds": _spread(rows),
        "runs": rows,
    }


def _differ(one: Record, other: Record) -> bool:
    scored = one.status == other.status == "finished" and one.test and other.test
    return bool(scored) and described(one) != described(other)


def _row(published: Record, repeated: Record, first: Store, second: Store) -> dict[str, Any]:
    assert published.test is not None and repeated.test is not None
    answers = [store.answers(published.id).predictions for store in (first, second)]
    changed = sum(_said(one) != _said(other) for one, other in zip(*answers, strict=True))
    return {
        "id": published.id,
        "cell": " × ".join(published.key.cell),
        "seed": published.key.seed,
        "published": published.test.value,
        "repeated": repeated.test.value,
        "answers": len(answers[0]),
        "answers_changed": changed,
    }


def _said(prediction: Any) -> Any:
    """A prediction without its probability, whose last digits are the machine's."""
    return {**prediction, "probability": None} if isinstance(prediction, dict) else prediction


def _spread(rows: list[dict[str, Any]]) -> float:
    """The standard deviation over the seeds of a cell as published, mean over cells."""
    cells: dict[str, list[float]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row["published"])
    return statistics.mean(statistics.stdev(scores) for scores in cells.values() if len(scores) > 1)


def _processor(record: Record) -> str:
    return str(record.environment.get("processor"))


if __name__ == "__main__":
    main()
