"""Run shipped recipes over several seeds and write down what came of it.

    PEFTKIT_DATA=<folder with sst2/> python benchmarks/recipes.py --seeds 1 2 3 sst2_lora sst2_full sst2_head

Every run is `accelerate launch recipes/<method>.py --config recipes/configs/<name>.yaml training.seed=<seed>`. A run
that is finished is not repeated, so the command can be stopped and started again. The result file holds every run's
scores, cost and environment; the table in README.md is printed from it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from peftkit.config import Run, load_run, run_id
from peftkit.environment import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = {
    "bottleneck_adapters": ("bottleneck",),
    "from_peft": ("ia3", "prompt", "p_tuning", "peft", "vera"),
    "partial": ("bitfit", "layernorm", "top_layers"),
}
RECIPE = {kind: recipe for recipe, kinds in SHARED.items() for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--name", default="recipes", help="of the result file")
    parser.add_argument("--note", default="", help="about the circumstances, kept in the result file")
    options = parser.parse_args()
    rows = [finished(name, seed, options.runs) for name in options.configs for seed in options.seeds]
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {"command": " ".join(sys.argv), "note": options.note, "environment": describe(), "runs": rows}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(summary(rows))


def finished(name: str, seed: int, runs: Path) -> dict[str, Any]:
    """The figures of one run, which is made first if need be."""
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    folder = runs / f"{name}-seed{seed}"
    plain = load_run(config)
    # what trains nothing has the seed of its configuration, which chooses its examples
    seeded = [f"training.seed={seed}"] if plain.method.trains else []
    if not (folder / "manifest.json").is_file():
        kind = plain.method.kind
        recipe = "qlora.py" if plain.backbone.quantization else f"{RECIPE.get(kind, kind)}.py"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        # the launcher's own choice is one thread
        launch += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))]
        command = [*launch, str(ROOT / "recipes" / recipe)]
        command += ["--config", str(config), *seeded, f"output.folder={folder}"]
        subprocess.run(command, check=True)
    made = load_run(folder / "run.yaml")
    if run_id(without_examples(made)) != run_id(without_examples(load_run(config, seeded))):
        raise SystemExit(f"{folder} holds another run than {config} describes; remove it, or name other --runs")
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = ("run_id", "scores", "training", "evaluated_on", "versions")
    return {"config": name, "seed": seed} | {key: manifest[key] for key in keys}


def without_examples(run: Run) -> Run:
    """The run before prompting chose examples to show."""
    if run.method.trains:
        return run
    return run.model_copy(update={"task": run.task.model_copy(update={"demonstrations": ()})})


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: mean of the headline over seeds, every seed, and the cost."""
    lines = [
        "| configuration | trained | untuned | tuned (mean) | by seed | seconds | tokens/s | peak GiB |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row["config"] for row in rows):
        lines.append("| " + " | ".join(_cells(name, [row for row in rows if row["config"] == name])) + " |")
    return "\n".join(lines)


def _cells(name: str, runs: list[dict[str, Any]]) -> list[str]:
    headline = next(iter(runs[0]["scores"]["after"]))
    before, after = ([run["scores"].get(when, {}).get(headline) for run in runs] for when in ("before", "after"))
    costs = [run["training"] for run in runs]
    return [
        f"`{name}`",
        f"{costs[0]['trainable_parameters']:,}",
        "" if None in before else f"{statistics.mean(before):.4f}",
        f"{statistics.mean(after):.4f} {headline.replace('_', ' ')}",
        ", ".join(f"{run['seed']}: {value:.4f}" for run, value in zip(runs, after, strict=True)),
        f"{statistics.median(cost['seconds'] for cost in costs):.0f}",
        f"{statistics.median(cost['tokens_per_second'] for cost in costs):,.0f}",
        f"{max(cost['peak_memory_bytes'] for cost in costs) / 2**30:.2f}",
    ]


if __name__ == "__main__":
    main()
