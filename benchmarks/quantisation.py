"""What holding a backbone in fewer bits costs in quality, and what it saves.

    PEFTKIT_DATA=<folder with sst2/ and wikitext2_raw/> OMP_NUM_THREADS=1 python benchmarks/quantisation.py

MiniLM on SST-2 (test accuracy: the head alone, which shows what the frozen features are worth, and LoRA) and
SmolLM2-135M on WikiText-2 (perplexity of the test text: untuned, and LoRA), each in float32, bfloat16, int8 and NF4.
All settings but how the backbone is held are those of the shipped configuration, shortened as ARMS says. A run that is
finished is not repeated, so the command can be stopped and started again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from peftkit.backbones.load import load
from peftkit.backbones.quantize import is_quantized
from peftkit.config import load_run
from peftkit.environment import describe
from peftkit.prepare import prepare

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "quantisation.json"
HELD = {
    "float32": ["backbone.dtype=float32"],
    "bfloat16": ["backbone.dtype=bfloat16"],
    "int8": ["backbone.dtype=bfloat16", "backbone.quantization={kind: int8}"],
    "nf4": ["backbone.dtype=bfloat16", "backbone.quantization={kind: nf4}"],
}
ARMS = {
    "sst2_head": ("SST-2 accuracy, head alone", "accuracy", ["training.max_steps=100", "training.evaluate_every=100"]),
    "sst2_lora": ("SST-2 accuracy, LoRA", "accuracy", ["training.max_steps=160", "training.evaluate_every=160"]),
    "wikitext2_lora": (
        "WikiText-2 perplexity, 2 steps of LoRA",
        "perplexity",
        ["task.data.limit=100", "training.max_steps=2", "training.evaluate_every=2"],
    ),
}
"""Configuration → title, figure, and what is shortened."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=list(ARMS), metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quantisation")
    parser.add_argument("--note", default="", help="about the circumstances, kept in the result file")
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else []
    for name in options.configs:
        for seed in options.seeds:
            rows += [
                finished(name, held, seed, options.runs)
                for held in HELD
                if not any((row["config"], row["held"], row["seed"]) == (name, held, seed) for row in rows)
            ]
            document = {"command": " ".join(sys.argv), "note": options.note, "environment": describe(), "runs": rows}
            RESULT.write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))


def finished(name: str, held: str, seed: int, runs: Path) -> dict[str, Any]:
    """The figures of one run, which is made first if need be, in a process of its own."""
    folder, config = runs / f"{name}-{held}-seed{seed}", ROOT / "recipes" / "configs" / f"{name}.yaml"
    overrides = [*HELD[held], *ARMS[name][2], f"training.seed={seed}", f"output.folder={folder}"]
    if not (folder / "manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "peftkit.cli", "train", str(config), *overrides], check=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = ("run_id", "scores", "training", "versions")
    row = {"config": name, "held": held, "seed": seed} | {key: manifest[key] for key in keys}
    return row | {"weight_bytes": weight_bytes(config, overrides)}


def weight_bytes(config: Path, overrides: list[str]) -> int:
    """What the backbone takes in memory: parameters and buffers, and the scales of what is quantised."""
    from peftkit.backbones.quantized_layers import packed_bytes

    run = load_run(config, [*overrides, "task.data.limit=20"])
    model = load(run.backbone, prepare(run).head).model
    quantised = [module for module in model.modules() if is_quantized(module)]
    scales = sum(packed_bytes(module) - module.weight.nbytes for module in quantised)  # type: ignore[operator]
    unnamed = sum(module.scales.nbytes for module in quantised if hasattr(module, "scales"))  # buffers already
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + scales - unnamed


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: one row for each way to hold a backbone, on each task."""
    lines = [
        "| task | held in | weights MiB | untuned | tuned (mean) | by seed | seconds | peak GiB |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, (title, figure, _) in ARMS.items():
        for held in HELD:
            runs = [row for row in rows if (row["config"], row["held"]) == (name, held)]
            if not runs:
                continue
            tuned = [run["scores"]["after"][figure] for run in runs]
            cells = [title, held, f"{runs[0]['weight_bytes'] / 2**20:.1f}"]
            cells += [f"{statistics.mean(run['scores']['before'][figure] for run in runs):.4f}"]
            cells += [f"{statistics.mean(tuned):.4f}"]
            cells += [", ".join(f"{run['seed']}: {value:.4f}" for run, value in zip(runs, tuned, strict=True))]
            cells += [f"{statistics.median(run['training']['seconds'] for run in runs):.0f}"]
            cells += [f"{max(run['training']['peak_memory_bytes'] for run in runs) / 2**30:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
