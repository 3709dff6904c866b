"""Feeds peftkit with input that is wrong in ways nobody thought of, and tells what it does not refuse in plain words.

    python benchmarks/fuzz.py config|adapters|data [--minutes 10] [--seed 0]

config: configuration files, through `peftkit validate`. adapters: folders of finished runs whose manifests fit them,
through `peftkit predict`. data: data files of every format, through `peftkit audit` and what prepares training. A
finding is an exception that peftkit did not raise on purpose, more than 10 seconds of the processor (or 60 of waiting),
or more than a GiB of memory for one input. Needs hypothesis, which comes with the extra `test`. What was found, or that
nothing was, goes to results/fuzz.json; the exit code is 1 where something was.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
RESULT = Path(__file__).parent / "results" / "fuzz.json"
ROUND = 250
"""Inputs that are drawn from one seed."""
STUCK = 120
"""Seconds after which an input that Python cannot interrupt ends the process, with a traceback."""


@dataclass
class Fuzzing:
    """Inputs that were examined, and what was found: by kind and place, the shortest input that shows it."""

    target: Any
    examples: int = 0
    accepted: int = 0
    findings: dict[str, str] = field(default_factory=dict)

    def examine(self, example: Any) -> None:
        """Examine one input."""
        from benchmarks.fuzzing.watch import Finding

        self.examples += 1
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            self.accepted += self.target.check(example)
        except (Exception, Finding) as error:
            place, shown = _place(error), repr(example)
            if place not in self.findings:
                traceback.print_exception(error, limit=-6)
                print(f"{place}\n{shown[:3000]}\n", file=sys.stderr, flush=True)
            if len(shown) < len(self.findings.get(place, shown + " ")):
                self.findings[place] = shown
        finally:
            faulthandler.cancel_dump_traceback_later()

    def go_on(self, seconds: float, seed: int) -> None:
        """Draw and examine inputs for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._round(end, seed)
            seed += 1

    def _round(self, end: float, seed: int) -> None:
        import hypothesis

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(self.target.examples())
        def one(example: Any) -> None:
            if time.monotonic() < end:
                self.examine(example)

        one()


def target(name: str, folder: Path) -> Any:
    """What is fed, ready in a folder."""
    if name == "config":
        from benchmarks.fuzzing.configs import Configs

        return Configs(folder)
    if name == "adapters":
        from benchmarks.fuzzing.adapters import Adapters

        return Adapters(folder)
    from benchmarks.fuzzing.data import Data

    return Data(folder)


def _place(error: BaseException) -> str:
    """What was raised, and where in peftkit."""
    ours = [one for one in traceback.extract_tb(error.__traceback__) if "/peftkit/" in one.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}{where}: {first[:100]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("config", "adapters", "data"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from benchmarks.fuzzing.watch import GROWTH, SECONDS
    from peftkit.environment import describe
    from peftkit.memory import peak_resident_bytes

    with tempfile.TemporaryDirectory() as folder:
        fuzzing = Fuzzing(target(options.target, Path(folder)))
        start, before = time.monotonic(), peak_resident_bytes()
        fuzzing.go_on(options.minutes * 60, options.seed)
        minutes, after = (time.monotonic() - start) / 60, peak_resident_bytes()
    results: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results[options.target] = {
        "command": shlex.join(["python", "benchmarks/fuzz.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "minutes": round(minutes, 1),
        "examples": fuzzing.examples,
        "accepted": fuzzing.accepted,
        "findings": fuzzing.findings,
        "most_seconds_allowed": SECONDS,
        "most_growth_allowed_gib": GROWTH / 2**30,
        "growth_of_all_gib": round((after - before) / 2**30, 2),
        "environment": describe(),
    }
    RESULT.write_text(json.dumps(results, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    print(f"{options.target}: {fuzzing.examples:,} inputs in {minutes:.1f} minutes, {len(fuzzing.findings)} findings")
    return 1 if fuzzing.findings else 0


if __name__ == "__main__":
    sys.exit(main())
