"""Writes files and folders whole or not at all, with the modes the umask asks for, and only where there is room."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from peftkit.errors import ArtifactError, UsageError

FULL = 2**20
"""A disk with fewer bytes left is why a write failed, whatever the writer says."""


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `final` (in place of an older one) unless an error is raised.

    Raises:
        OSError: with ENOSPC for a full disk, however the library that wrote reports it.
    """
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _full_disk_told(final):
            yield partial
        follow_umask(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A file to write, which becomes `final` unless an error is raised. Raises as `whole_folder` does."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode & 0o666
    try:
        with _full_disk_told(final):
            yield partial
        partial.chmod(mode)
        partial.rename(final)
    finally:
        partial.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give files that were written for their owner alone, as safetensors does, the mode of every other new file."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def file_sha256(file: Path) -> str:
    """The hash of one file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start what `needed` bytes in `folder` would not hold; what is in it already counts as free.

    Raises:
        ArtifactError: says how much is missing where.
    """
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(place).free + held
    if free < needed:
        raise ArtifactError(
            f"{folder}: checkpoints and the result need {_size(needed)}, and {_size(free)} are free; "
            "free some, or name an output.folder on another disk"
        )


def require_writable(target: Path) -> None:
    """Refuse a file or folder to be made where nothing can be made.

    Raises:
        UsageError: its nearest existing parent is not a folder, or not one that this user may write to.
    """
    parent = next(one for one in target.absolute().parents if one.exists())
    if not parent.is_dir():
        raise UsageError(f"cannot write {target}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write {target}: {parent} is not writable")


@contextlib.contextmanager
def _full_disk_told(final: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors and torch report a full disk as errors of their own
        code = getattr(error, "errno", None)
        if code == errno.ENOSPC or "os error 28" in str(error) or shutil.disk_usage(final.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
        raise


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
