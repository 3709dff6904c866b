"""C++ that is compiled on this machine when it is first needed, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from peftkit.backbones.bundled import cache_folder
from peftkit.backbones.precision import processor_flags
from peftkit.errors import BackboneError

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
LIBRARIES = ("-lstdc++", "-lm")
"""Named, because CXX may be a compiler of C, which takes C++ and leaves its library out: peft's BOFT sets it to `gcc`,
and does not set it back where CUDA is missing."""
COMPILERS = ("g++", "c++", "clang++")
OFTEN = 0.99
"""Rate of dropout up to which compiled code is exact to a part in a million: it tells 2³² draws apart."""
SEEDS = 2**62
"""Of its draws."""


def compiler() -> str | None:
    """The C++ compiler: what CXX names, or the first that is on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)


def why_not() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if sys.platform != "linux":
        return f"code is compiled on Linux only, and this is {sys.platform}"
    if compiler() is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)}, or what CXX names)"
    return ""


def _where_it_can(asked: bool | str) -> bool:
    return not why_not() if asked == "auto" else bool(asked)


Compiled = Annotated[Literal["auto"] | bool, AfterValidator(_where_it_can)]
"""What is written; what is held is never `auto`, so that a run is named and recorded by what computes it."""


@functools.cache
def library(name: str, **constants: int) -> ctypes.CDLL:
    """The functions of `name`.cpp beside this file, compiled with these constants for this processor.

    Raises:
        BackboneError: there is no compiler, or it fails.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    file = _kept(source, constants)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(source, constants, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BackboneError(f"{file}: {error.strerror or error}{_mend(source)}") from None


def _mend(source: Path) -> str:
    return f"; set engine.compiled_{source.stem}: false to do without compiled code"


def _kept(source: Path, constants: Mapping[str, int]) -> Path:
    """Where the library is kept: another one for another source, compiler or processor."""
    reason, program = why_not(), compiler()
    if reason or program is None:
        raise BackboneError(f"{source.name} cannot be compiled: {reason}{_mend(source)}")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    texts = [one.read_text(encoding="utf-8") for one in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, repr(sorted(constants.items())), *FLAGS, *LIBRARIES, program, version]
    key = hashlib.sha256("\0".join([*parts, *sorted(processor_flags())]).encode()).hexdigest()[:16]
    return cache_folder() / "compiled" / f"{source.stem}-{key}.so"


def _compile(source: Path, constants: Mapping[str, int], file: Path) -> None:
    """In a file of another name first, so that no process meets half a library."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        defined = [f"-D{name}={value}" for name, value in constants.items()]
        done = subprocess.run(
            [str(compiler()), *FLAGS, *defined, str(source), "-o", str(made), *LIBRARIES],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            told = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise BackboneError(f"{compiler()} cannot compile {source.name}: {told}{_mend(source)}")
        ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        made.replace(file)
