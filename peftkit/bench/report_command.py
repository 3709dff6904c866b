"""The options of `peftkit bench report` and `peftkit bench compare`, and what they do. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peftkit.bench.store import RESULTS, RUNS
from peftkit.console import say
from peftkit.errors import DataError, UsageError


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """What `peftkit bench report` takes."""
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="results, as `peftkit bench run` writes them (default: those that changed last under runs/bench)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the page, Markdown and tables go (default: FOLDER/report)"
    )
    parser.add_argument(
        "--margin", type=float, metavar="M", help="how far apart “as good as” may be (default: 0.01, one point)"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="METHOD",
        help="compare all others with this one; may be given again (default: full and lora)",
    )
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument("--mixed", action="store_true", help="let different versions, code or machines stand together")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """What `peftkit bench compare` takes."""
    parser.add_argument("first", type=Path, metavar="A", help="a folder of results")
    parser.add_argument("second", type=Path, metavar="B", help="another, with some of the same cells")
    parser.add_argument("--json", action="store_true")


def report_command(options: argparse.Namespace) -> None:
    """Write a report and say what it recommends.

    Raises:
        DataError: after writing, where files were damaged: the report is without them.
    """
    from peftkit.bench.report import MARGIN, report

    folder = options.folder or _newest()
    written = report(
        folder,
        options.out or folder / "report",
        options.reference,
        MARGIN if options.margin is None else options.margin,
        options.mixed,
        options.title,
    )
    for block, advice in written.advice:
        say(f"{block.title}\n  {advice.text if advice else 'nothing has a score yet'}")
    say(f"wrote {', '.join(map(str, written.files))}")
    if damaged := written.results.damaged:
        told = "\n".join(f"  {name}: {why}" for name, why in sorted(damaged.items()))
        raise DataError(
            f"{folder}: {len(damaged)} files are damaged, and the report is without them; remove "
            f"{RUNS}/<id>.json of each, and `peftkit bench run` makes them again\n{told}"
        )


def _newest() -> Path:
    """The folder of results to which a run was added last."""
    found = [one for one in RESULTS.glob(f"*/{RUNS}") if one.is_dir()]
    if not found:
        raise UsageError(f"no results under {RESULTS}; name a folder, or make some with `peftkit bench run GRID`")
    return max(found, key=lambda one: one.stat().st_mtime_ns).parent


def compare_command(options: argparse.Namespace) -> None:
    """Print what differs between two folders of results."""
    from peftkit.bench.compare import compare, shown

    found = compare(options.first, options.second)
    say(json.dumps(found.as_dict(), indent=2) if options.json else shown(found))
