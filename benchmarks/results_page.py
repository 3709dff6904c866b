"""Write docs/results.md from the result files of benchmarks/results/.

python benchmarks/results_page.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = """\
# Results

Every row is one shipped configuration, run to its end by its one command:
`peftkit train recipes/configs/<configuration>.yaml`. The runs are short on purpose (minutes on one CPU core) and have
one seed: they show that a task is learnt and what to expect of the command, and rank nothing. The baseline is the
answer that ignores the input (`majority`), or the untuned model on the same rows (`untuned`), which for language
models is zero-shot prompting. Seconds are of training alone, on one thread of a machine that other work shared.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page, from the result files."""
    document = json.loads((ROOT / "benchmarks" / "results" / "tasks.json").read_text(encoding="utf-8"))
    return "\n".join([INTRODUCTION, *_table(document["runs"]), "", f"Made by `{document['command']}`."]) + "\n"


def _table(runs: list[dict[str, Any]]) -> list[str]:
    header = "| configuration | task | method | figure | baseline | result | rows | trained | seconds | seed |"
    return [header, "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", *map(_row, runs)]


def _row(run: dict[str, Any]) -> str:
    scores, name = run["scores"], run["headline"]
    baseline = "majority" if name in scores.get("majority", {}) else "untuned"
    before = scores["majority" if baseline == "majority" else "before"][name]
    figure = name.replace("_", " ") + (" (lower is better)" if run["lower_is_better"] else "")
    training = run["training"]
    cells = [f"`{run['config']}`", run["task"].replace("_", " "), run["method"], figure]
    cells += [f"{before:.4f} {baseline}", f"{scores['after'][name]:.4f}", f"{run['examples']:,}"]
    cells += [f"{training['trainable_parameters']:,}", f"{training['seconds']:.0f}", str(run["seed"])]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
