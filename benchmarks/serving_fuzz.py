"""What schemathesis finds in the service: requests made from its OpenAPI document, valid and not, to a real process.

    pip install schemathesis
    python benchmarks/serving_fuzz.py [--examples 200] [--seed 1]

The service has eight runs on a tiny BERT and API keys. All checks of schemathesis are on: no answer may be a server
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import tiny_bert  # noqa: E402
from benchmarks.served import WORDS, make_runs, served  # noqa: E402
from peftkit.environment import describe  # noqa: E402

RESULT = Path(__file__).parent / "results" / "serving_fuzz.json"
KEY = "a key for schemathesis alone"
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
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        backbone = tiny_bert.make(
            folder / "bert",
            WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
        runs = make_runs(folder, str(backbone), steps=2)
        key_file = folder / "keys"
        key_file.write_text(KEY.replace(" ", "-") + "\n")
        key_file.chmod(0o600)
        with served(runs, folder / "serve.log", "--key-file", str(key_file)) as (address, _):
            report = fuzz(address, folder, options.examples, options.seed)
        log = (folder / "serve.log").read_text()
    report["failures_in_log"] = log.count(" ERROR ")
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("exit_code", "requests", "failures", "failures_in_log")}))
    if report["exit_code"] or report["failures_in_log"]:
        raise SystemExit(report["output_end"])


def fuzz(address: str, folder: Path, examples: int, seed: int) -> dict[str, object]:
    """Run schemathesis, and read its summary."""
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    tool = Path(sys.executable).parent / "schemathesis"
    command = [str(tool), "--config-file", str(folder / "schemathesis.toml"), "run", f"{address}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY.replace(' ', '-')}", "--checks", "all", "--seed", str(seed)]
    command += ["--max-examples", str(examples), "--workers", "2", "--request-timeout", "60"]
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
        "examples": examples,
        "seed": seed,
        "schemathesis": importlib.metadata.version("schemathesis"),
        "output_end": text[-6000:],
        "environment": describe(),
    }


if __name__ == "__main__":
    main()
