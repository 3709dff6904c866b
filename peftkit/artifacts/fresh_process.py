"""The other process, which reads merged models back: it is started, asked and ended."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peftkit
from peftkit.backbones.load import Head
from peftkit.data.files import Rows
from peftkit.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "peftkit.artifacts.plain_reader"
PATIENCE = 30.0
"""Seconds that the process has to end once its input has."""


@dataclass(frozen=True)
class Probe:
    """What the model that was read back is to be asked."""

    run: Path
    """The run's folder, whose configuration says how rows are encoded."""
    head: Head
    rows: Rows
    examples: int
    """The first ones, whose logits are wanted."""


class Rereader:
    """A process without peft, to which folders are given one by one."""

    waiting = False
    """A folder was given to it, and it has not answered."""

    def __init__(self) -> None:
        place = str(Path(peftkit.__file__).parents[1])
        paths = [place, *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # it lasts as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=pipe,
            stdout=pipe,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=os.environ | settings,
        )

    def describe(
        self, folder: Path, model_class: str, dtype: str, weights: bool = True, probe: Probe | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """What plain transformers finds in a folder, and the logits that the model has for the probe.

        Args:
            dtype: what tensors are cast to before they are hashed.
            weights: read them too.

        Raises:
            ArtifactError: it cannot be read, or the process was ended.
        """
        with tempfile.TemporaryDirectory() as scratch:
            request: dict[str, Any] = {"folder": str(folder.absolute()), "model_class": model_class, "dtype": dtype}
            request |= {"weights": weights, "probe": probe and _written(probe, Path(scratch))}
            found = self._answer(request)
            if "error" in found:
                raise ArtifactError(f"the merged model cannot be read back: {found['error']}; nothing was written")
            return found, _logits(found["shapes"], Path(scratch)) if probe else []

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word, as where memory ran out"

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def kill(self) -> None:
        """End the process at once, whatever it is at."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self.waiting = True
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise ArtifactError(
                f"the process that reads the merged model back ended by itself (code {code}: {self._last_words()}); "
                "nothing was written"
            )
        self.waiting = False
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def fresh_process() -> Iterator[Rereader]:
    """A process that has nothing of this one's memory, for as long as it is needed."""
    reader = Rereader()
    try:
        yield reader
    except BaseException:
        reader.kill()
        raise
    reader.close()


@contextmanager
def reading(given: Rereader | None) -> Iterator[Rereader]:
    """The process that was given, or one that is started for what is to be read."""
    if given is not None:
        yield given
        return
    with fresh_process() as reader:
        yield reader


def _written(probe: Probe, folder: Path) -> dict[str, Any]:
    rows = folder / "rows.json"
    held = {field.name: getattr(probe.rows, field.name) for field in dataclasses.fields(Rows)}
    # columns that the task does not read may hold what JSON has no form for
    rows.write_text(json.dumps(held | {"places": list(probe.rows.places)}, default=str), encoding="utf-8")
    settings = {"run": str(probe.run.absolute()), "rows": str(rows), "answers": str(folder)}
    return settings | {"head": dataclasses.asdict(probe.head), "examples": probe.examples}


def _logits(shapes: list[list[int]], folder: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    from peftkit.artifacts.plain_reader import LOGITS

    flat = load_file(folder / LOGITS)["logits"]
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
