"""What each aid against overfitting does where there is little data, one at a time beside none.

    PEFTKIT_DATA=<folder with sst2/> OMP_NUM_THREADS=1 python benchmarks/aids.py

SST-2 with 200 training rows, LoRA on MiniLM, 60 steps of 10 examples (3 epochs), seeds 1 to 3; the figures are of the
first 400 test rows after the last step, where the aid is not early stopping itself. About ten minutes of one CPU core.
With 400 rows an accuracy has a standard error of 2 points: only differences that all seeds agree on tell anything.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftkit.artifacts.ensemble import load_runs
from peftkit.artifacts.predict import evaluate_rows
from peftkit.artifacts.store import save
from peftkit.backbones.load import load
from peftkit.config import Run
from peftkit.data.files import read_file
from peftkit.data.sources import Splits
from peftkit.environment import describe
from peftkit.evaluation import Evaluation, evaluate
from peftkit.prepare import prepare
from peftkit.session import start
from peftkit.training.loop import train

ROOT = Path(__file__).parent.parent
TRAIN, DEV, TEST = 200, 100, 400
BASE: dict[str, Any] = {
    "backbone": {"name": "bundled:minilm"},
    "task": {"kind": "sequence_classification", "text": "sentence", "max_length": 64},
    "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": "all"},
    "training": {"learning_rate": 2e-3, "batch_size": 10, "warmup_ratio": 0.06, "keep_best": False},
}
AIDS: dict[str, dict[str, Any]] = {
    "none": {},
    "early stopping": {"training": {"evaluate_every": 10, "early_stopping_patience": 2, "keep_best": True}},
    "dropout 0.2": {"backbone": {"dropout": 0.2}, "method": {"dropout": 0.2}},
    "weight decay 0.1": {"training": {"weight_decay": 0.1}},
    "label smoothing 0.1": {"task": {"loss": {"kind": "label_smoothed", "smoothing": 0.1}}},
    "R-Drop 1": {"training": {"r_drop": 1.0}},
    "FGM 0.5": {"training": {"adversarial": 0.5}},
    "deletion and swap": {"task": {"augmentation": ({"kind": "deletion"}, {"kind": "swap"})}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, metavar="FOLDER", help="with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "aids.json")
    options = parser.parse_args()
    splits = read_rows(options.data)
    with tempfile.TemporaryDirectory() as scratch:
        figures: dict[str, list[dict[str, float]]] = {}
        for name, aid in AIDS.items():
            for seed in options.seeds:
                row = trained(described(aid, seed, options.steps, Path(scratch) / f"{name}-{seed}"), splits)
                figures.setdefault(name, []).append(row)
                print(name, seed, {key: round(value, 4) for key, value in row.items()}, file=sys.stderr, flush=True)
        together = load_runs([Path(scratch) / f"none-{seed}" for seed in options.seeds])
        figures["ensemble of the seeds of none"] = [scores(evaluate_rows(together, splits.held_out))]
    document = {"command": " ".join(sys.argv), "environment": describe(), "rows": [TRAIN, DEV, TEST], "aids": figures}
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(figures))


def read_rows(folder: str | None) -> Splits:
    """The first rows of each split."""
    place = Path(folder or f"{os.environ['PEFTKIT_DATA']}/sst2")
    train, dev, test = (
        read_file(place / f"{name}.tsv").head(count) for name, count in (("train", TRAIN), ("dev", DEV), ("test", TEST))
    )
    return Splits(train, dev, test)


def described(aid: dict[str, Any], seed: int, steps: int, folder: Path) -> Run:
    """The run without aids, with one of them."""
    sections = {name: section | aid.get(name, {}) for name, section in BASE.items()}
    sections["training"] |= {"seed": seed, "max_steps": steps}
    sections["training"].setdefault("evaluate_every", steps)
    return Run(**sections, output={"folder": str(folder)})


def trained(run: Run, splits: Splits) -> dict[str, float]:
    """The figures of one run, which is kept in its folder."""
    accelerator = start(run, needs_data=False)
    data = prepare(run, splits)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=run.training.total_steps(len(data.train.encoded)))
    record = train(model, run, data, accelerator)
    after = evaluate(model, run.task, data.test, accelerator)
    save(run, data, backbone, model, record, {"after": after}, accelerator)
    cost = {"seconds": record.seconds, "last_loss": record.losses[-1], "steps": float(record.steps)}
    return scores(after) | cost


def scores(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy, and −log of the probability of the right class, which tells certainty that is not earned."""
    references = [str(record["label"]) for record in evaluation.split.rows.records]
    pairs = zip(evaluation.predictions, references, strict=True)
    losses = [-math.log(max(1e-12, one["probabilities"][reference])) for one, reference in pairs]
    return {"accuracy": evaluation.scores.values["accuracy"], "loss": statistics.mean(losses)}


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds with their spread, and the difference to none seed by seed."""
    lines = ["| aid | accuracy | − none, seed by seed | test loss | seconds |", "| --- | --- | --- | --- | --- |"]
    for name, rows in figures.items():
        accuracies = [row["accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(rows) > 1 else ""
        pairs = zip(rows, figures["none"], strict=False) if len(rows) > 1 else ()
        against = ", ".join(f"{one['accuracy'] - other['accuracy']:+.4f}" for one, other in pairs)
        loss = statistics.mean(row["loss"] for row in rows)
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}" if "seconds" in rows[0] else ""
        lines.append(f"| {name} | {statistics.mean(accuracies):.4f}{spread} | {against} | {loss:.4f} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
