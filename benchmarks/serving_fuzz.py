"""What schemathesis finds in the service: requests made from its OpenAPI document, valid and not, to a real process.

    pip install schemathesis
    python benchmarks/serving_fuzz.py [--examples 200] [--seed 1]

One service has eight runs on a tiny BERT and API keys; another has five on a tiny Llama, of which four write, so that
texts are generated and streamed. All checks of schemathesis are on: no answer may be a server
error, have a status, a type or a form that the document does not promise, or come without a key. A request that fits
the document may still not fit the adapter (a pair for a task of single texts, rows without its columns), which is
answered with 404, 413 or 422. The result goes to results/serving_fuzz.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import tiny_bert, tiny_llama  # noqa: E402
from benchmarks.served import RUNS, WORDS, WRITERS, make_runs, served  # noqa: E402
from peftkit.environment import describe  # noqa: E402

RESULT = Path(__file__).parent / "results" / "serving_fuzz.json"
KEY = "a key for schemathesis alone"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 404, 413, 422]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 404, 405, 413, 422]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="requests for each route, at most, of each kind")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report: dict[str, Any] = {"examples": options.examples, "seed": options.seed, "services": {}}
    with tempfile.TemporaryDirectory() as work:
        for name, backbone, runs in (("encoder", _bert, RUNS), ("decoder", _llama, WRITERS)):
            folder = Path(work) / name
            made = make_runs(folder, str(backbone(folder / "backbone")), steps=2, runs=runs)
            report["services"][name] = fuzzed(made, folder, options.examples, options.seed)
    report |= {"schemathesis": importlib.metadata.version("schemathesis"), "environment": describe()}
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, found in report["services"].items():
        print(name, json.dumps({key: value for key, value in found.items() if key != "output_end"}))
        if found["exit_code"] or found["failures_in_log"]:
            raise SystemExit(found["output_end"])


def _bert(folder: Path) -> Path:
    return tiny_bert.make(folder, WORDS, num_hidden_layers=2, **SIZES)


def _llama(folder: Path) -> Path:
    return tiny_llama.make(folder, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=1024, **SIZES)


def fuzzed(runs: dict[str, Path], folder: Path, examples: int, seed: int) -> dict[str, Any]:
    """What was found in a service over these runs, and how it answered."""
    key_file = folder / "keys"
    key_file.write_text(KEY.replace(" ", "-") + "\n")
    key_file.chmod(0o600)
    with served(runs, folder / "serve.log", "--key-file", str(key_file)) as (address, _):
        report = fuzz(address, folder, examples, seed)
    log = (folder / "serve.log").read_text()
    return report | {"runs": list(runs), "failures_in_log": log.count(" ERROR "), "answers": answers(log)}


def answers(log: str) -> dict[str, dict[str, int]]:
    """How often each route was answered with each status, by the service's own log."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in re.findall(r"\{\"method\".*\}", log):
        noted = json.loads(line)
        found[noted["route"]][str(noted["status"])] += 1
    return {route: dict(sorted(counts.items())) for route, counts in sorted(found.items())}


def fuzz(address: str, folder: Path, examples: int, seed: int) -> dict[str, Any]:
    """Run schemathesis, and read its summary."""
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    tool = Path(sys.executable).parent / "schemathesis"
    command = [str(tool), "--config-file", str(folder / "schemathesis.toml"), "run", f"{address}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY.replace(' ', '-')}", "--checks", "all", "--seed", str(seed)]
    # one worker: Python 3.11's own parser, which hypothesis reads functions with, may fail in two threads
    command += ["--max-examples", str(examples), "--workers", "1", "--request-timeout", "60"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=1500,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )
    text = done.stdout
    cases = re.search(r"([\d,]+) generated", text)
    return {
        "exit_code": done.returncode,
        "requests": int(cases[1].replace(",", "")) if cases else None,
        "failures": sorted(set(re.findall(r"^- (.+)$", text, re.MULTILINE))),
        "output_end": text[-6000:],
    }


if __name__ == "__main__":
    main()
