"""Tokens of large splits, kept between runs: encoded once, mapped into memory from then on.

What is kept is found by a hash of everything that it was made from: rows, task, tokenizer, labels and code. So nothing
that is out of date is ever found, and what is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.bundled import cache_folder
from peftkit.data.arrays import Table
from peftkit.data.rows import Rows
from peftkit.disk import file_sha256, remove_folder, whole_folder
from peftkit.environment import sources_sha256, versions
from peftkit.tasks.base import Encoded, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANY = 20_000
"""Rows from which on a split is kept: it takes seconds to encode, and its tokens hundreds of bytes a row as lists."""
MOST = 4 * 2**30
"""Bytes that are kept in all; what was not read for the longest time goes first."""
FORMAT = 1
ENTRY = "encoded.json"


def encoded(
    task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool
) -> Encoded:
    """What `task.encode` makes of the rows, or made of them before; its examples are read from disk when asked for."""
    from filelock import FileLock

    folder = tokens_folder()
    name = _key(task, rows, tokenizer, labels, supervised)
    made = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):  # one of several processes encodes, the others read
            found = _found(folder / name)
            if found is None:
                made = task.encode(rows, tokenizer, labels, supervised)
                found = _kept(made, folder / name)
            return found
    except OSError as error:
        warnings.warn(f"tokens are not kept in {folder}: {error.strerror or error}", RuntimeWarning, stacklevel=2)
        return task.encode(rows, tokenizer, labels, supervised) if made is None else made


def tokens_folder() -> Path:
    """Where they are kept."""
    return cache_folder() / "tokens"


def _key(task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], supervised: bool) -> str:
    digest = hashlib.sha256()
    code = [FORMAT, sources_sha256("tasks", "data"), versions(), supervised, labels]
    for part in (*code, task.model_dump(mode="json", exclude={"data"}), _described(tokenizer), rows.source):
        digest.update(json.dumps(part, sort_keys=True, default=repr).encode() + b"\0")
    for place, record in zip(rows.places, rows.records, strict=True):
        digest.update(json.dumps([place, record], default=repr).encode() + b"\0")
    return digest.hexdigest()[:32]


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All of a tokenizer that decides what it makes of a text."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # how it last cut and filled up texts is no part of it
    backend["truncation"] = backend["padding"] = None
    names = ("special_tokens_map", "model_input_names", "truncation_side", "chat_template")
    return {"class": type(tokenizer).__name__, "backend": backend} | {
        name: getattr(tokenizer, name, None) for name in names
    }


def _found(folder: Path) -> Encoded | None:
    """What is kept there; None where there is nothing, or it is damaged."""
    try:
        known = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        if any(file_sha256(folder / name) != digest for name, digest in known["files"].items()):
            return None
        table = Table.read(folder, known["columns"])
        (folder / ENTRY).touch()  # was read now
    except (OSError, ValueError, LookupError, TypeError):
        return None
    dropped = {int(index): why for index, why in known["dropped"].items()}
    return Encoded(table, known["truncated"], known["owners"], dropped, tuple(known["notes"]))


def _kept(made: Encoded, folder: Path) -> Encoded:
    """Keep it, and read it back; as it is where arrays cannot hold it."""
    try:
        table = Table.of(made.examples)
    except OverflowError:
        table = None
    if table is None:
        return made
    with whole_folder(folder) as partial:
        columns = table.write(partial)
        files = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
        known = {
            "truncated": made.truncated,
            "owners": None if made.owners is None else list(made.owners),
            "dropped": dict(made.dropped),
            "notes": made.notes,
            "columns": columns,
            "files": files,
        }
        (partial / ENTRY).write_text(json.dumps(known), encoding="utf-8")
    _make_room(folder)
    return _found(folder) or made


def _make_room(newest: Path) -> None:
    """Remove what was not read for the longest time, until what is left is small enough."""
    entries = sorted(newest.parent.glob(f"*/{ENTRY}"), key=lambda entry: entry.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.parent.iterdir())
        if total > MOST and entry.parent != newest:
            remove_folder(entry.parent)
