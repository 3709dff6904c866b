"""What `peftkit plan` expects of runs, beside what the runs take.

    python benchmarks/plan.py predict        writes benchmarks/results/plan_predictions.json
    python benchmarks/plan.py measure        runs each in a process of its own; writes benchmarks/results/plan.json
    python benchmarks/plan.py table          prints both as the table of docs/plan.md

Predictions are written, and committed, before anything is measured. Data and backbones come through pip, but for those
under the folder that PEFTKIT_DATA names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
PREDICTIONS = ROOT / "benchmarks" / "results" / "plan_predictions.json"
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
SHORT = ("training.max_steps=3", "training.evaluate_every=3", "training.warmup_ratio=0.0", "task.data.limit=96")
LONG = ("task.max_length=256", "training.batch_size=16", "training.micro_batch_size=16")
RUNS: dict[str, tuple[str, ...]] = {
    "LoRA, short": ("reuters_r8_lora", *SHORT),
    "LoRA, long": ("reuters_r8_lora", *SHORT, *LONG),
    "LoRA, long, checkpointed": ("reuters_r8_lora", *SHORT, *LONG, "training.gradient_checkpointing=true"),
    "LoRA, long, bfloat16": (
        "reuters_r8_lora", *SHORT, *LONG, "backbone.dtype=bfloat16", "training.precision=bf16",
    ),
    "DoRA, long": ("reuters_r8_lora", *SHORT, *LONG, "method.variant=dora"),
    "bottleneck, long": ("reuters_r8_bottleneck", *SHORT, *LONG),
    "prefix": ("reuters_r8_prefix", *SHORT),
    "prefix, long": ("reuters_r8_prefix", *SHORT, *LONG),
    "full": ("reuters_r8_full", *SHORT),
    "full, long, checkpointed": ("reuters_r8_full", *SHORT, *LONG, "training.gradient_checkpointing=true"),
    "head": ("reuters_r8_head", *SHORT),
    "NF4 LoRA, long": ("reuters_r8_lora", *SHORT, *LONG, "backbone.quantization.kind=nf4"),
    "causal LoRA": (
        "wikitext2_lora", *SHORT, "task.max_length=128", "training.batch_size=4", "training.micro_batch_size=2",
        "training.evaluation_batch_size=4",
    ),
}  # fmt: skip

RUNS |= {f"{name}, tight": (*run, "training.allocator=tight") for name, run in RUNS.items()}


def predict(names: list[str]) -> None:
    """Plan every run, or those that are named."""
    from peftkit.config import load_run
    from peftkit.planning.plan import plan as plan_run

    for name in names or RUNS:
        config, *overrides = RUNS[name]
        plan = plan_run(load_run(CONFIGS / f"{config}.yaml", overrides), alone=True).as_dict()
        found = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {}
        found[name] = {"config": config, "overrides": overrides} | plan
        PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:32} {plan['peak_bytes'] / 2**20:8.0f} MiB  {plan['seconds']:.0f} s", flush=True)


def measure(names: list[str]) -> None:
    """Take every run's steps, and compare."""
    from peftkit.environment import describe

    for name, plan in json.loads(PREDICTIONS.read_text()).items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "one", str(CONFIGS / f"{plan['config']}.yaml"), *plan["overrides"]]
            command.append(f"output.folder={folder}/run")
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        row = compared(plan, json.loads(done.stdout.splitlines()[-1]))
        shown = f"{row['predicted_mib']:8.0f} {row['measured_mib']:8.0f}  {row['error_percent']:+.1f} %"
        print(f"{name:32} {shown}", flush=True)
        found = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
        figures = {
            "command": "python benchmarks/plan.py measure",
            "environment": describe(),
            "runs": found | {name: row},
        }
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


def compared(plan: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """Predicted beside measured."""
    predicted, measured = plan["peak_bytes"], real["memory_growth_bytes"]
    return {
        "predicted_mib": round(predicted / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "error_percent": round(100 * (predicted - measured) / measured, 2),
        # limits a little above and below what it took: the verdicts that would have been right are yes and no
        "fits_110_percent": predicted <= 1.1 * measured,
        "fits_90_percent": predicted <= 0.9 * measured,
        "predicted_step_seconds": round(plan["step_seconds"], 3),
        "measured_step_seconds": round(real["step_seconds"], 3),
    }


def table(names: list[str]) -> None:
    """Print what was measured as Markdown."""
    print(as_markdown(json.loads(RESULTS.read_text())["runs"]))


def as_markdown(runs: dict[str, Any]) -> str:
    """One row for each run: its peak under glibc's heap, and with `training.allocator: tight`."""
    lines = [
        "| run | predicted MiB | measured | error | `tight`: predicted | measured | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (one for one in RUNS if not one.endswith(", tight")):
        cells = [name]
        for row in (runs.get(name), runs.get(f"{name}, tight")):
            figures = (f"{row['predicted_mib']:,.0f}", f"{row['measured_mib']:,.0f}") if row else ("", "")
            cells += [*figures, f"{row['error_percent']:+.1f} %" if row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def one(arguments: list[str]) -> None:
    """One run in this process; prints what it took."""
    from peftkit.config import load_run
    from peftkit.experiment import train

    record = train(load_run(Path(arguments[0]), arguments[1:])).record
    print(
        json.dumps({"memory_growth_bytes": record.memory_growth_bytes, "step_seconds": record.seconds / record.steps})
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.time()
    verb, *rest = sys.argv[1:]
    {"predict": predict, "measure": measure, "one": one, "table": table}[verb](rest)
    if verb in ("predict", "measure"):
        print(f"{time.time() - started:.0f} s")
