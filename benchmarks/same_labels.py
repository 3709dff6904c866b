"""Whether a tuned classifier gives the same labels however it is asked: `evaluate`, `predict`, merged, ONNX, HTTP.

    python -m benchmarks.same_labels [--rows 200] [--run runs/demo | --steps 80]

A run of `recipes/configs/reuters_r8_lora.yaml` (MiniLM; model and data come through pip) is merged, exported to ONNX
and served: the one that is named, such as that of `make demo`, or else a short one. Test rows, spread over the whole
split, then go through the command line's `predict`, through transformers and ONNX Runtime with nothing of peftkit, and
over HTTP, and are compared with the predictions that the evaluation at the end of the training wrote. The result goes
to results/same_labels.json; the exit code is 1 where a label differs anywhere but in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.served import served
from peftkit.environment import describe

os.environ.setdefault("OMP_NUM_THREADS", "1")
RESULT = Path(__file__).parent / "results" / "same_labels.json"
CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "reuters_r8_lora.yaml"
MINUTES = 30
LOT = 16
"""Texts of a request over HTTP; the other ways are asked one by one, `predict` in the run's batches."""
EXACT = ("predict", "merged", "onnx", "http")
"""Ways that have to give every label that the evaluation gave; what 8 bits cost is told."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, help="a finished run of the shipped configuration")
    which.add_argument("--steps", type=int, default=80, help="of the run that is trained where none is named")
    options = parser.parse_args()
    if options.run and not (options.run / "predictions.jsonl").is_file():
        parser.error(f"{options.run} is no finished run")
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or trained(Path(folder), options.rows, options.steps)
        result = compare(run, Path(folder), options.rows)
    RESULT.write_text(json.dumps(result | {"environment": describe()}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return int(any(result[way]["equal"] < options.rows for way in EXACT))


def trained(folder: Path, rows: int, steps: int) -> Path:
    """A short run."""
    run = folder / "run"
    peftkit("train", configuration(folder, rows), f"training.max_steps={steps}", f"output.folder={run}")
    return run


def compare(run: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Merge, export, serve, and ask in every way."""
    merged, graph, test = folder / "merged", folder / "onnx", folder / "asked.jsonl"
    records = lines_of((run / "predictions.jsonl").read_text(encoding="utf-8"))
    chosen = [index * len(records) // rows for index in range(rows)]
    asked = rows_of(run, chosen)
    test.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    texts = [str(one["Text"]) for one in asked]
    peftkit("merge", run, merged, "--probe-rows", rows)
    report = json.loads(peftkit("export", run, graph, "--format", "onnx", "--int8", "--data", test, "--json"))
    del report["compared_on"]  # a temporary file
    evaluated = [records[index]["prediction"]["label"] for index in chosen]
    given = {
        "predict": [one["label"] for one in lines_of(peftkit("predict", run, "--file", test))],
        "merged": by_transformers(merged, texts),
        "onnx": by_onnx(graph, "model.onnx", texts),
        "onnx_int8": by_onnx(graph, "model_int8.onnx", texts),
        "http": by_http(run, folder / "serve.log", texts),
    }
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return {
        "rows": rows,
        "of_test_rows": len(records),
        "run_id": manifest["run_id"],
        "steps": manifest["training"]["steps"],
        "labels_given": len(set(evaluated)),
        "accuracy": agreement([records[index]["reference"] for index in chosen], evaluated)["equal"] / rows,
        **{way: agreement(evaluated, labels) for way, labels in given.items()},
        "export": report,
    }


def rows_of(run: Path, chosen: list[int]) -> list[dict[str, Any]]:
    """Rows of the run's own test split, in which they have the places that they have in its predictions."""
    from peftkit.artifacts.manifest import read_saved_config

    return list(read_saved_config(run).task.splits().held_out.take(chosen).records)


def configuration(folder: Path, rows: int) -> Path:
    """The shipped configuration with so many test rows and eight times as many to train on, spread over the whole."""
    import yaml

    from peftkit.config import load_run

    splits = load_run(CONFIG).task.splits()
    assert splits.test is not None
    for name, part, count in (("train", splits.train, 8 * rows), ("test", splits.test, rows)):
        chosen = part.take(index * len(part) // count for index in range(count))
        text = "".join(json.dumps(one) + "\n" for one in chosen.records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tree = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    tree["task"]["data"] = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


def lines_of(text: str) -> list[dict[str, Any]]:
    """One JSON object a line."""
    return [json.loads(line) for line in text.splitlines()]


def by_transformers(folder: Path, texts: list[str]) -> list[str]:
    """The label of each text by the merged model, as transformers alone loads it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def logits(tokens: Any) -> Any:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in tokens.items()}).logits

    return labelled(folder, texts, logits)


def by_onnx(folder: Path, file: str, texts: list[str]) -> list[str]:
    """The label of each text by a graph in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return labelled(folder, texts, lambda tokens: session.run(["logits"], {name: tokens[name] for name in names})[0])


def labelled(folder: Path, texts: list[str], logits: Callable[[Any], Any]) -> list[str]:
    """The label of each text, asked one by one, with the tokenizer and the names that lie beside a model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    tokens = (tokenizer(text, truncation=True, max_length=96, return_tensors="np") for text in texts)
    return [labels[str(int(logits(one).argmax()))] for one in tokens]


def by_http(run: Path, log: Path, texts: list[str]) -> list[str]:
    """The label of each text by a service in a process of its own."""
    found: list[str] = []
    with served({"asked": run}, log) as (address, _):
        for start in range(0, len(texts), LOT):
            request = urllib.request.Request(
                f"{address}/v1/adapters/asked/predict",
                json.dumps({"texts": texts[start : start + LOT]}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60 * MINUTES) as answer:
                found += [one["label"] for one in json.load(answer)["predictions"]]
    return found


def agreement(expected: list[str], found: list[str]) -> dict[str, int]:
    """How many labels are equal, of how many."""
    return {"equal": sum(one == other for one, other in zip(expected, found, strict=True)), "of": len(expected)}


def peftkit(*arguments: object) -> str:
    """What a verb prints."""
    command = [sys.executable, "-m", "peftkit.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
