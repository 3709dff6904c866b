"""Whether trainings with dropout end alike: test scores of peftkit, of its engine off, and of Trainer + peft.

Dropout draws other elements in each, so that losses cannot be compared step by step. The whole shipped configuration
is trained, with LoRA's dropout at 0.1 and the last weights kept, and differences are tested over seeds and test
examples by `peftkit.bench.statistics`.

    python -m benchmarks.speed.seeds '{"kind": "peftkit", …}'

is the process of one training; it prints what each test row adds to the score.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.speed import stock
from benchmarks.speed.arms import BASE, OFF
from benchmarks.speed.processes import answer
from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import Workload
from peftkit.environment import describe
from peftkit.errors import UsageError

MARGIN = 0.01
"""Within which scores count as equal."""
SETTINGS = ("method.dropout=0.1", "training.keep_best=false")
KINDS: dict[str, dict[str, Any]] = {
    "peftkit": {"kind": "peftkit"},
    "peftkit, engine off": {"kind": "peftkit", "more": [OFF]},
    BASE: {"kind": "stock"},
}


def seeds(workload: Workload, count: int, work: Path, results: Results) -> dict[str, Any]:
    """Complete the trainings of seeds 1 to `count`, and compare all pairs."""
    results.set("environment", describe())
    for seed in range(1, count + 1):
        for name, kind in KINDS.items():
            if results.has(name, seed):
                continue
            overrides = [*SETTINGS, f"training.seed={seed}", *kind.get("more", [])]
            asked = {"config": str(workload.file), "overrides": overrides, "folder": str(work / "seeds")}
            found = answer("seeds", {"kind": kind["kind"]} | asked)
            results.put(name, seed, found)
            tell(f"seed {seed}: {name}: {found['score']:.4f}")
    compared = compare(results.kept["arms"], count)
    results.set("compared", compared)
    return compared


def compare(arms: dict[str, Any], count: int) -> dict[str, Any]:
    """Scores of each arm, and of each pair the difference with its interval and whether they can be told apart."""
    from peftkit.bench.samples import Samples
    from peftkit.bench.statistics import difference, equivalence

    samples = {}
    for name, rounds in arms.items():
        taken = [rounds[str(seed)] for seed in range(1, count + 1)]
        sums = ([one[key] for one in taken] for key in ("numerators", "denominators"))
        samples[name] = Samples(*sums, taken[0]["lower_is_better"], taken[0]["transform"])
    pairs = []
    for first, second in combinations(samples, 2):
        apart = difference(samples[first], samples[second])
        alike = equivalence(samples[first], samples[second], MARGIN)
        pairs.append(
            {
                "first": first, "second": second, "difference": apart.mean, "low": apart.low, "high": apart.high,
                "p_value": apart.p_value, "margin": MARGIN, "verdict": alike.verdict,
                "distinguishable": apart.p_value < 0.05,
            }
        )  # fmt: skip
    return {"scores": {name: one.values.tolist() for name, one in samples.items()}, "pairs": pairs}


def _one(kind: str, config: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train once and score on test."""
    import torch

    from benchmarks.speed.plan import make_plan
    from peftkit.config import load_run
    from peftkit.evaluation import evaluate
    from peftkit.experiment import train
    from peftkit.prepare import prepare
    from peftkit.session import start

    run = load_run(config, [*overrides, f"output.folder={folder / 'run'}", "output.overwrite=true"])
    if kind == "peftkit":
        found = train(run).evaluations["after"]
    else:
        trained: list[Any] = []
        make_plan(config, overrides, folder / "plan")
        stock.train(folder / "plan", "trainer", False, None, trained.append)
        accelerator, data = start(run), prepare(run)
        with torch.no_grad():
            found = evaluate(trained[0].eval(), run.task, data.test, accelerator)
    counts = run.task.counts(found.predictions, found.split.rows, found.split.labels)
    if counts is None:
        raise UsageError(f"{config}: its score is no ratio of sums over rows, so it cannot be compared row by row")
    how = {"transform": counts.transform, "lower_is_better": found.scores.lower_is_better}
    return {
        "score": found.scores.value,
        "numerators": list(counts.numerators),
        "denominators": list(counts.denominators),
    } | how


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_one(given["kind"], Path(given["config"]), given["overrides"], Path(given["folder"]))))
