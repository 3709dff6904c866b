"""`peftkit audit`: the report on the terminal, as JSON, and as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.audit.examine import Progress, audit_run
from peftkit.audit.html import page
from peftkit.audit.terminal import show
from peftkit.config import Run
from peftkit.console import say
from peftkit.disk import write_text
from peftkit.errors import DataError


def audit_shown(run: Run, title: str, as_json: bool = False, html: Path | None = None) -> None:
    """Audit a run's data and show the report.

    Raises:
        DataError: something in it would stop training.
    """
    with _bar() as progress:
        report = audit_run(run, progress)
    if html is not None:
        write_text(html, page(report, f"Audit of {title}"))
    if as_json:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        show(report)
    if html is not None and not as_json:
        say(f"wrote {html}")
    if report.grave:
        raise DataError(report.verdict())


@contextmanager
def _bar() -> Iterator[Progress]:
    """Rows that are done, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TextColumn

    columns: list[Any] = [TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows")]
    with Bars(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("reading")

        def told(split: str, rows: int) -> None:
            bars.update(task, description=f"encoding {split}", advance=rows)

        yield told
