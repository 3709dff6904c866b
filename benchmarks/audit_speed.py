"""How long `peftkit audit` takes on a million rows of 25 tokens, and how much memory.

    python benchmarks/audit_speed.py [ROWS]

Rows are sentences of 23 words that are tokens of their own in MiniLM's vocabulary; with the two special tokens each
has 25. They are written as JSON lines, tab and comma separated, and each is audited in a process of its own. Seconds
are wall clock; on a machine that does other work, processor seconds tell more. The result goes to
results/audit_speed.json, beside the processor seconds of MiniLM's tokenizer alone on the same texts, which no audit
can do without.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "audit_speed.json"
WORDS, FORMATS = 23, ("jsonl", "tsv", "csv")
CONFIG = """
backbone: {{name: "bundled:minilm"}}
task:
  kind: sequence_classification
  data: {{train: train.{format}, dev: dev.{format}, test: test.{format}}}
  max_length: 64
method: {{kind: lora}}
training: {{learning_rate: 1e-3}}
"""


def sentences(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(text, label) of `WORDS` words."""
    chance, words = random.Random(seed), _vocabulary()
    for _ in range(count):
        yield " ".join(chance.choices(words, k=WORDS)), chance.choice(("negative", "positive"))


def write(folder: Path, format: str, rows: int) -> None:
    """Train of `rows` rows, dev and test of 1,000."""
    line = {"jsonl": '{{"text": "{}", "label": "{}"}}\n', "tsv": "{}\t{}\n", "csv": "{},{}\n"}[format]
    for seed, (split, count) in enumerate({"train": rows, "dev": 1000, "test": 1000}.items()):
        with (folder / f"{split}.{format}").open("w") as file:
            if format != "jsonl":
                file.write(line.format("text", "label"))
            file.writelines(line.format(text, label) for text, label in sentences(count, seed))
    (folder / f"{format}.yaml").write_text(CONFIG.format(format=format))


def measured(folder: Path, *command: str) -> dict[str, float]:
    """Seconds, processor seconds and peak memory in GiB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": used.ru_utime + used.ru_stime}
    return {name: round(value, 1) for name, value in seconds.items()} | {"peak_gib": round(used.ru_maxrss / 2**20, 2)}


def tokenizer_alone(rows: int) -> float:
    """Processor seconds of the tokenizers library for the texts of train."""
    tokenizer = _tokenizer().backend_tokenizer
    texts = [text for text, _ in sentences(rows, 0)]
    before = _processor_seconds()
    for start in range(0, rows, 50_000):
        tokenizer.encode_batch_fast(texts[start : start + 50_000])
    return round(_processor_seconds() - before, 1)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _tokenizer():
    from peftkit.backbones.load import BackboneSettings, load_tokenizer

    return load_tokenizer(BackboneSettings(name="bundled:minilm"), False)


def _vocabulary() -> list[str]:
    return sorted(word for word in _tokenizer().get_vocab() if word.isalpha() and word.isascii() and len(word) > 2)[
        :8000
    ]


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    result: dict[str, object] = {
        "rows": rows,
        "tokens_each": WORDS + 2,
        "threads": os.environ.get("RAYON_NUM_THREADS", "all"),
    }
    for format in FORMATS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, format, rows)
            result[format] = measured(folder, "-m", "peftkit.cli", "audit", f"{format}.yaml", "--html", "report.html")
            print(format, result[format], flush=True)
        _save(result)
    _save(result | {"tokenizer_alone_processor_seconds": tokenizer_alone(rows)})
    print(f"wrote {RESULT}")


def _save(result: dict[str, object]) -> None:
    """After each format, so that a run cut short leaves what it measured."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
