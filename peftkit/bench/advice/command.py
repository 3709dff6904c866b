"""`peftkit advise`: its options, and what it says."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.console import positive, say
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from peftkit.bench.advice.conduct import Conduct
    from peftkit.bench.advice.subject import Subject
    from peftkit.bench.advice.verdict import Verdict
    from peftkit.config import Run

MOST_WORKERS = 4
"""By default: each holds a model."""


def add_advise_options(parser: argparse.ArgumentParser) -> None:
    """What `peftkit advise` takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
    parser.add_argument("--budget-minutes", type=_minutes, required=True, metavar="M", help="time for all of it")
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help="only this method; repeatable")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the configuration to write (default: <CONFIG>_advised.yaml)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it is there")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the runs (default: runs/advise/<id>)")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="runs at a time (default: cores, 4 at most; 1 on a GPU)"
    )
    parser.add_argument("--json", action="store_true")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return minutes


def advise(options: argparse.Namespace) -> None:
    """Compare methods on the configuration's own data within the time, say which to use, and write its recipe.

    Raises:
        UsageError: a file that is there, an unknown method, or too little time.
        PeftkitError: no method could be run.
    """
    began = time.monotonic()
    from filelock import FileLock, Timeout

    from peftkit.bench.advice.conduct import Conduct
    from peftkit.bench.advice.recipe import check_output, default_output
    from peftkit.bench.advice.subject import subject_of
    from peftkit.bench.advice.verdict import verdict
    from peftkit.config import load_run

    output = options.output or default_output(options.config)
    run = load_run(options.config, options.overrides)
    check_output(output, options.overwrite)
    subject = subject_of(options.config.stem, run, options.method)
    folder = options.folder or Path("runs") / "advise" / subject.id
    tell = (lambda line: None) if options.json else say
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            budget = 60 * options.budget_minutes
            done = Conduct(subject, folder, budget, began, options.workers or _workers(), tell)
            for line in _beforehand(subject, done, folder):
                tell(line)
            done.run()
            found = verdict(done)
    except Timeout:
        raise UsageError(f"another advise is at work in {folder}; wait for it, or name another --folder") from None
    written = _write(options, subject, done, found, output)
    say(json.dumps(_as_dict(done, found, output), indent=2) if options.json else _shown(done, found))
    for line in _afterwards(options, written, output):
        tell(line)


def _workers() -> int:
    import torch

    from peftkit.bench.processes import default_workers

    return 1 if torch.cuda.is_available() else min(default_workers(), MOST_WORKERS)


def _beforehand(subject: Subject, done: Conduct, folder: Path) -> list[str]:
    """What is going to be compared."""
    chosen = subject.candidates.chosen
    own = subject.candidates.own
    names = [f"{name} (as {subject.name} has it)" if name == own else name for name in chosen]
    most = max(len(one.rates) for one in chosen.values())
    lines = [
        f"comparing {', '.join(names)}, at up to {most} learning rates each, on {subject.dev_rows:,} rows of dev and "
        f"{subject.train_rows:,} of train; test is left alone",
        *subject.notes,
        *(f"left out: {name}: {why}" for name, why in subject.candidates.left_out.items()),
    ]
    spent = f", of which {done.state.spent / 60:.1f} are spent" if done.state.spent else ""
    begin = "" if done.state.calibration else "; first a few steps, to see how fast this machine is"
    return [*lines, f"{done.budget / 60:g} minutes{spent}, {done.workers} at a time; runs in {folder}{begin}"]


def _write(options: argparse.Namespace, subject: Subject, done: Conduct, found: Verdict, output: Path) -> Run:
    from peftkit.bench.advice.recipe import write_recipe

    name = found.arm.method
    method = None if name == subject.candidates.own else subject.candidates.chosen[name].method
    comments = [
        f"{subject.name} with the method that `peftkit advise --budget-minutes {options.budget_minutes:g}` found, on "
        f"{subject.dev_rows:,} rows of dev after {found.steps:,} steps",
        found.text,
        *found.doubts,
    ]
    return write_recipe(options.config, options.overrides, method, found.arm.learning_rate, comments, output)


def _shown(done: Conduct, found: Verdict) -> str:
    from peftkit.bench import numbers
    from peftkit.tables import table

    scale = numbers.Scale(found.is_share)
    lines = [["method", "rate", "steps", "seeds", f"dev {found.headline}", "seconds", "trainable", ""]]
    lines += [
        [
            row.arm.method,
            numbers.rate(row.arm.learning_rate),
            f"{row.steps:,}",
            str(row.seeds),
            scale.score(row.score),
            f"{row.seconds:.0f}",
            numbers.count(row.trainable),
            row.fate,
        ]
        for row in found.rows
    ]
    doubts = [f"  - {one}" for one in found.doubts]
    used = f"used {done.spent / 60:.1f} of {done.budget / 60:g} minutes"
    advice = f"Use {found.arm.method} at learning rate {numbers.rate(found.arm.learning_rate)}.\n{found.text}"
    return "\n".join(["", table(lines), "", advice, *doubts, used])


def _as_dict(done: Conduct, found: Verdict, output: Path) -> dict[str, object]:
    subject = done.subject
    return found.as_dict() | {
        "output": str(output),
        "folder": str(done.store.folder),
        "dev_rows": subject.dev_rows,
        "steps": found.steps,
        "seeds": found.seeds,
        "configured_steps": subject.steps,
        "left_out": dict(subject.candidates.left_out),
        "notes": list(subject.notes),
        "budget_seconds": done.budget,
        "used_seconds": done.spent,
    }


def _afterwards(options: argparse.Namespace, written: Run, output: Path) -> list[str]:
    lines = [f"wrote {output}: peftkit train {output}"]
    if written.output.folder is not None:
        lines.append(f"its output.folder is {written.output.folder}, as in {options.config}: name another for this run")
    return lines
