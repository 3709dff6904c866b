"""Writes files and folders whole or not at all, with the modes the umask asks for, and only where there is room.

What was written has reached the disk before its name does, so that a machine may fail at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
            for one in (*partial.rglob("*"), partial):
                sync(one)
        remove_folder(final)
        partial.rename(final)
        sync(final.parent)
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
            sync(partial)
        partial.rename(final)
        sync(final.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(place: Path) -> None:
    """Wait until the disk holds the bytes of a file, or the names in a folder."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks have none for folders
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there; one that is half removed no longer has its name."""
    if not folder.is_dir() or folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    going = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def sweep(folder: Path) -> None:
    """Remove what a killed process left of `whole_folder`, `whole_file` and `remove_folder`."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


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


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The hash of what a manifest says, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def require_space(
    folder: Path,
    needed: int,
    what: str = "checkpoints and the result need",
    mend: str = "name an output.folder on another disk",
) -> None:
    """Refuse to start what `needed` bytes in `folder` would not hold; what is in it already counts as free.

    Args:
        what: whatever needs them.
        mend: what else to do than to free some.

    Raises:
        ArtifactError: says how much is missing where.
    """
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(place).free + held
    if free < needed:
        raise ArtifactError(f"{folder}: {what} {_size(needed)}, and {_size(free)} are free; free some, or {mend}")


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
