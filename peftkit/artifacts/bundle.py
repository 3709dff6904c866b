"""A run as one folder with everything that it needs, for methods whose result no plain transformers model can hold.

It is a run folder with the backbone inside: `peftkit.load_predictor`, `peftkit predict` and `peftkit serve` take it.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.artifacts.bundle_check import EXAMPLES, LOGITS, ROWS, compared_logits, encoded
from peftkit.artifacts.loading import SavedRun, load_run
from peftkit.artifacts.manifest import read_manifest
from peftkit.artifacts.target import check_new_folder
from peftkit.backbones.load import HUB_FILES, resolve, weight_files
from peftkit.backbones.runs import BUNDLED, MANIFEST
from peftkit.data.rows import Rows
from peftkit.disk import file_sha256, manifest_sha256, require_space, whole_folder, write_text
from peftkit.errors import ArtifactError, UsageError

REPORT = "peftkit_bundle.json"
TOLERANCE = 1e-6
"""Largest accepted |Δlogit| / max(1, largest |logit|); the same code computes both, in two processes."""
PATIENCE = 3600
"""Seconds that the other process may take."""


@dataclass(frozen=True)
class BundleReport:
    """How far the bundle, loaded by a process of its own, is from the run that it was made from."""

    rows: int
    numbers: int
    """Logits compared."""
    largest_difference: float
    largest_logit: float
    bytes: int

    @property
    def relative(self) -> float:
        """Largest |Δlogit| over max(1, largest |logit|)."""
        return self.largest_difference / max(1.0, self.largest_logit)


def bundle(folder: Path, target: Path, probe: Rows | None = None, probe_rows: int = 32) -> BundleReport:
    """Write a run and its backbone into `target`, load that in a fresh process and compare; nothing is left unless its
    logits are equal.

    Args:
        probe: rows to compare on; default: the run's test split, else dev.
        probe_rows: so many of them, from the first on.

    Raises:
        UsageError: no finished run, a target that exists or lies inside the run, or no rows to compare on.
        ArtifactError: the disk is too small, or the bundle computes something else.
    """
    manifest = read_manifest(folder)
    check_new_folder(target, [folder], "a bundle")
    saved = load_run(folder)
    rows = _as_json((probe or saved.run.task.splits().held_out).head(probe_rows))
    files = list(_backbone_files(resolve(saved.run.backbone)))
    names = sorted(manifest["files"])
    require_space(target, sum(file.stat().st_size for file in (*files, *(folder / name for name in names))))
    with whole_folder(target) as partial:
        for name in names:
            _copy(folder / name, partial / name)
        for file in files:
            _copy(file, partial / BUNDLED / file.name)
        held = {name: file_sha256(partial / name) for name in (*names, *(f"{BUNDLED}/{one.name}" for one in files))}
        manifest["files"] = held
        write_text(partial / MANIFEST, json.dumps(manifest | {"sha256": manifest_sha256(manifest)}, indent=2) + "\n")
        report = _compared(saved, partial, rows)
        record = asdict(report) | {"relative": report.relative, "tolerance": TOLERANCE, "run_id": manifest["run_id"]}
        write_text(partial / REPORT, json.dumps(record, indent=2) + "\n")
    return report


def _backbone_files(folder: Path) -> Iterator[Path]:
    """Configuration, tokenizer and weights; nothing else that a checkpoint's folder may hold."""
    yield from weight_files(folder)
    small = (pattern for pattern in HUB_FILES if pattern != "*.safetensors")
    yield from sorted({file for pattern in small for file in folder.glob(pattern) if file.is_file()})


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _as_json(rows: Rows) -> Rows:
    """The rows, which another process is to be given.

    Raises:
        UsageError: none, or some that JSON does not hold.
    """
    if not rows.records:
        raise UsageError(f"{rows.source} has no rows to compare the bundle on; give others with --data FILE")
    try:
        json.dumps(rows.records)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{rows.source}: rows to compare on must be JSON ({error}); give --data FILE") from error
    return rows


def _compared(saved: SavedRun, folder: Path, rows: Rows) -> BundleReport:
    import torch
    from safetensors.torch import load_file

    split = encoded(saved, rows)
    before = compared_logits(saved, split)
    with tempfile.TemporaryDirectory(prefix="peftkit-bundle-") as work:
        asked = {"source": rows.source, "records": rows.records}
        (Path(work) / ROWS).write_text(json.dumps(asked), encoding="utf-8")
        _in_another_process(folder, Path(work))
        after = load_file(Path(work) / LOGITS)["logits"]
        read = json.loads((Path(work) / EXAMPLES).read_text(encoding="utf-8"))
    if read != json.loads(json.dumps(list(split.encoded.examples))):
        raise ArtifactError("the bundle's tokenizer reads texts otherwise than the run's; nothing was written")
    same = before.shape == after.shape and not torch.isnan(before).any()
    report = BundleReport(
        rows=len(rows),
        numbers=before.numel(),
        largest_difference=float((before - after).abs().max()) if same else math.nan,
        largest_logit=float(before.abs().max()),
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )
    # written so that a difference that is not a number is refused too
    if not report.relative <= TOLERANCE:
        raise ArtifactError(
            f"the bundle is not the run that it was made from: logits differ by {report.largest_difference:.2g} "
            f"({report.relative:.2g} relative, {TOLERANCE:g} allowed); nothing was written"
        )
    return report


def _in_another_process(folder: Path, work: Path) -> None:
    command = [sys.executable, "-m", "peftkit.artifacts.bundle_check", str(folder), str(work)]
    done: Any = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ArtifactError(f"the bundle could not be loaded by a process of its own: {last}; nothing was written")
