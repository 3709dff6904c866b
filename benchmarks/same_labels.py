"""Whether a tuned classifier gives the same labels however it is asked: `evaluate`, `predict`, and ONNX Runtime.

    python -m benchmarks.same_labels [--rows 200] [--steps 80]

A short LoRA run on Reuters R8 (MiniLM; both come through pip) is exported to ONNX. Test rows then go through the
command line's `predict` and through ONNX Runtime with nothing of peftkit, and are compared with the predictions that
the evaluation at the end of the training wrote. The result goes to results/same_labels.json; the exit code is 1
where a label differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftkit.environment import describe

os.environ.setdefault("OMP_NUM_THREADS", "1")
RESULT = Path(__file__).parent / "results" / "same_labels.json"
CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "reuters_r8_lora.yaml"
MINUTES = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), options.rows, options.steps)
    RESULT.write_text(json.dumps(result | {"environment": describe()}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return int(result["predict"]["equal"] < options.rows or result["onnx"]["equal"] < options.rows)


def compare(folder: Path, rows: int, steps: int) -> dict[str, Any]:
    """Train, export, ask in every way."""
    run, graph, test = folder / "run", folder / "onnx", folder / "test.jsonl"
    peftkit("train", configuration(folder, rows), f"training.max_steps={steps}", f"output.folder={run}")
    report = json.loads(peftkit("export", run, graph, "--format", "onnx", "--int8", "--json"))
    del report["compared_on"]  # a temporary file
    records = lines_of((run / "predictions.jsonl").read_text(encoding="utf-8"))
    given = [str(one["Text"]) for one in lines_of(test.read_text(encoding="utf-8"))]
    predicted = lines_of(peftkit("predict", run, "--file", test))
    evaluated = [one["prediction"]["label"] for one in records]
    return {
        "rows": rows,
        "steps": steps,
        "labels_given": len(set(evaluated)),
        "accuracy": sum(one["reference"] == one["prediction"]["label"] for one in records) / rows,
        "predict": agreement(evaluated, [one["label"] for one in predicted]),
        "onnx": agreement(evaluated, by_onnx(graph, "model.onnx", given)),
        "onnx_int8": agreement(evaluated, by_onnx(graph, "model_int8.onnx", given)),
        "export": report,
    }


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


def by_onnx(folder: Path, file: str, texts: list[str]) -> list[str]:
    """The label of each text, asked one by one."""
    import onnxruntime
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    names = [one.name for one in session.get_inputs()]
    found = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=96, return_tensors="np")
        found.append(labels[str(session.run(["logits"], {name: tokens[name] for name in names})[0].argmax())])
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
