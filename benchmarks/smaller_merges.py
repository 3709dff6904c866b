"""What smaller merges of a run cost: packed by bitsandbytes, or without its top blocks.

    python -m benchmarks.smaller_merges runs/demo [--rows 200]

Each is one `peftkit merge RUN OUT …`, whose own report is kept. The result goes to results/smaller_merges.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.same_labels import peftkit
from peftkit.artifacts.merge import REPORT
from peftkit.environment import describe

RESULT = Path(__file__).parent / "results" / "smaller_merges.json"
WAYS = (
    ("--quantize", "nf4"),
    ("--quantize", "int8"),
    ("--drop-layers", "1"),
    ("--drop-layers", "2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--rows", type=int, default=200, help="of dev, to compare on")
    options = parser.parse_args()
    found = {" ".join(way): merged(options.run, options.rows, way) for way in WAYS}
    result = {"command": f"python -m benchmarks.smaller_merges {' '.join(sys.argv[1:])}", "merges": found}
    RESULT.write_text(json.dumps(result | {"environment": describe()}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def merged(run: Path, rows: int, way: tuple[str, str]) -> dict[str, Any]:
    """What the report of a merge says."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"
        peftkit("merge", run, target, "--probe-rows", rows, *way)
        report: dict[str, Any] = json.loads((target / REPORT).read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
