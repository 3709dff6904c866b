"""Where a result may be written: a new folder, and outside of what it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.disk import require_writable
from peftkit.errors import UsageError
from peftkit.processes import require_one_process


def check_new_folder(target: Path, sources: Sequence[Path], what: str) -> None:
    """Refuse a target that exists or lies inside one of the sources, and processes that would write it together.

    Args:
        what: the work, such as `a combination`, for the message.

    Raises:
        UsageError: says which.
    """
    require_one_process(what)
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists; name a new folder for the result")
    for source in sources:
        if source.resolve() in target.resolve().parents:
            raise UsageError(f"{target} lies inside {source}; name a folder outside it")
    require_writable(target)
