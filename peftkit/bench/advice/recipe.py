"""Writes a configuration anew with the method that was advised, and everything else as it was."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.bench import numbers
from peftkit.config import Run, validate
from peftkit.config_file import Document, parse_document, read_document, to_yaml
from peftkit.disk import require_writable, write_text
from peftkit.errors import ConfigError, UsageError
from peftkit.methods.base import Method

WIDTH = 110
"""Characters of a line of comment."""


def default_output(config: Path) -> Path:
    """`<stem>_advised.yaml` beside the configuration, or here where that folder cannot be written to."""
    beside = config.with_name(f"{config.stem}_advised.yaml")
    try:
        require_writable(beside)
    except UsageError:
        return Path(beside.name)
    return beside


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a file that is there, or that cannot be made, before any work is done.

    Raises:
        UsageError: names it.
    """
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file in it")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; name another file with --output, or replace it with --overwrite")
    require_writable(output)


def write_recipe(
    config: Path, overrides: Sequence[str], method: Method | None, rate: float, comments: Sequence[str], output: Path
) -> Run:
    """Write the configuration with its method and learning rate replaced, and return what it describes.

    Comments and order of the file stay where its form allows that, and no override changes it.

    Args:
        method: None for the configuration's own.
    """
    document = read_document(config, overrides)
    section = document.tree["method"] if method is None else _section(method)
    training = document.tree.get("training", {}) | {"learning_rate": rate}
    wanted = document.tree | {"method": section, "training": training}
    text = None if overrides else _edited(config.read_text(encoding="utf-8-sig"), document, wanted)
    lines = [line for comment in comments for line in textwrap.wrap(comment, WIDTH)]
    heading = "".join(f"# {line}\n" for line in lines)
    run = validate(Document(str(output), wanted))
    write_text(output, heading + (text or to_yaml(wanted)))
    return run


def _section(method: Method) -> dict[str, Any]:
    """What was set of a method, as people write it."""
    values = {"kind": method.kind} | method.model_dump(mode="json", exclude_unset=True)
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in values.items()
    }


def _edited(text: str, document: Document, wanted: dict[str, Any]) -> str | None:
    """The file's own text with two places changed; None where that does not give what is wanted."""
    lines = text.splitlines(keepends=True)
    starts = sorted(line for key, line in document.lines.items() if len(key) == 1)
    start = document.lines.get(("method",), 0)
    rate_at = document.lines.get(("training", "learning_rate"), 0)
    if not start or not rate_at:
        return None
    end = next((line for line in starts if line > start), len(lines) + 1)
    while end - 1 > start and re.match(r"\s*(#|$)", lines[end - 2]):
        end -= 1  # what stands before the next section belongs to that
    rate = numbers.rate(wanted["training"]["learning_rate"])
    lines[rate_at - 1] = re.sub(r"(learning_rate\s*:\s*)[^\s#,}]+", rf"\g<1>{rate}", lines[rate_at - 1])
    lines[start - 1 : end - 1] = [to_yaml({"method": wanted["method"]})]
    edited = "".join(lines)
    try:
        return edited if parse_document(edited, document.source).tree == wanted else None
    except ConfigError:
        return None
