"""What four ways to learn a sequence of tasks keep of them: runs recipes/continual.py and writes down what came of it.

    PEFTKIT_DATA=<folder with sst2/ and tweet_emotion/> python benchmarks/continual.py --seeds 1 2 3

Every strategy is learnt with the first seed, then with the second, and so on, and its file in
benchmarks/results/continual/ is written anew after each. What is learnt is not learnt again, so the command can be
stopped and started again.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from peftkit.tables import table

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "continual.py"
CONFIG = ROOT / "recipes" / "sequences" / "sst2_emotion_r8.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "continual"
STRATEGIES = {
    "shared": ["strategy=shared", "replay=null"],
    "per_task": ["strategy=per_task", "replay=null"],
    "full": ["strategy=full", "replay=null", "method={kind: full}", "training.learning_rate=1e-4"],
    "replay": [],
}
"""By name: what differs from the configuration."""
FIGURES = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting", "forward_transfer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "continual")
    parser.add_argument("--note", default="", help="about the circumstances, kept in the result files")
    options = parser.parse_args()
    for count in range(1, len(options.seeds) + 1):
        for name in STRATEGIES:
            document = learnt(name, options.seeds[:count], options.runs / name)
            document = {"overrides": STRATEGIES[name], "note": options.note} | document
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{matrices()}\n\n{summary()}")


def learnt(name: str, seeds: list[int], folder: Path) -> dict[str, Any]:
    """What the recipe says of a strategy after so many seeds."""
    overrides = [*STRATEGIES[name], f"seeds={seeds}", f"output.folder={folder}"]
    sys.argv = [str(RECIPE), "--config", str(CONFIG), *overrides]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def summary() -> str:
    """A Markdown table: each figure's mean over seeds ± their standard deviation."""
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in STRATEGIES}
    lines = [
        "| strategy | trained | seeds | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(FIGURES),
    ]
    for name, one in found.items():
        cells = [_figure(one["mean"][figure], one["spread"][figure]) for figure in FIGURES]
        trained = one["seeds"][0]["trainable_parameters"]
        lines.append(f"| `{name}` | {max(trained):,} | {len(one['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrices() -> str:
    """R of every strategy as text, mean over seeds."""
    parts = []
    for name in STRATEGIES:
        one = json.loads((RESULTS / f"{name}.json").read_text())
        rows = [[name, *one["tasks"]]]
        for number, task in enumerate(one["tasks"]):
            columns = zip(*(seed["matrix"][number] for seed in one["seeds"]), strict=True)
            rows.append([f"after {task}", *(_mean(list(column)) for column in columns)])
        parts.append(table(rows))
    return "\n\n".join(parts)


def _mean(values: list[float | None]) -> str:
    known = [one for one in values if one is not None]
    return f"{sum(known) / len(known):.4f}" if known else "–"


def _figure(value: float | None, spread: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")


if __name__ == "__main__":
    main()
