"""Adapters that mean harm: whether they are refused, how soon, and what happens to a model that loads them.

Each kind of `hostile_kinds.py` is done to a genuine run, whose manifest is then made to fit. Loading happens in a
forked process with limits of time and memory. What schema, headers and the file system show must be refused within the
time and memory of `LIMITS`, counted after a genuine run was looked at once, so that imports are not. The stock column
loads the same adapter folder with `PeftModel.from_pretrained`; it has no manifest, so those kinds are not offered
there.
"""

from __future__ import annotations

import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.reliability import hostile_kinds, subjects
from benchmarks.reliability.confined import apart
from benchmarks.reliability.runs import NOT_OFFERED
from benchmarks.reliability.workbench import Workbench
from peftkit.errors import PeftkitError

GROUPS = {
    "shown": hostile_kinds.SHOWN,
    "placed": hostile_kinds.PLACED,
    "manifest": hostile_kinds.MANIFESTS,
    "loaded": hostile_kinds.LOADED,
}
LIMITS = (0.1, 10.0)
"""Seconds of the processor and megabytes, for all groups but `loaded`, which needs the backbone."""
SECONDS, MEGABYTES = 10.0, 2000
"""What a process may take before it is ended."""
REFUSED, OVER = "refused", "refused, over the limits"
GOOD = (REFUSED,)
SHORT = (
    *("shown/a regular expression", "shown/a huge header", "placed/a link", "manifest/a file above"),
    *("loaded/a weight of the backbone", "loaded/not a number"),
)


def trials(tier: str) -> list[str]:
    """Group/kind."""
    every = [f"{group}/{kind}" for group, kinds in GROUPS.items() for kind in kinds]
    return every if tier == "full" else list(SHORT)


def run(trial: str, column: str, bench: Workbench, folder: Path) -> dict[str, Any]:
    """Do harm to a copy and load it."""
    group, kind = trial.split("/", 1)
    if column == "stock" and group == "manifest":
        return NOT_OFFERED
    harm, message = GROUPS[group][kind]
    copied = Path(shutil.copytree(subjects.peftkit_adapter(bench, "lora", 1), folder / "run"))
    harm(copied)
    if group in ("shown", "loaded"):
        hostile_kinds.sign(copied)
    if column == "peftkit":
        return subjects.told(bench, _by_peftkit(bench, group, copied, message))
    return subjects.told(bench, _by_stock(bench, copied / "adapter"))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest and the largest of what schema and headers show."""
    shown = [row for row in rows if not row["trial"].startswith("loaded/") and "cpu_seconds" in row]
    if not shown:
        return {}
    return {
        "of what schema, headers and the file system show": {
            "most cpu_seconds": max(row["cpu_seconds"] for row in shown),
            "most megabytes": max(row["megabytes"] for row in shown),
        },
        "by kind": {row["trial"]: row["outcome"] for row in rows if row["outcome"] != "not offered"},
    }


def _by_peftkit(bench: Workbench, group: str, folder: Path, message: str) -> dict[str, Any]:
    from peftkit.artifacts.loading import load_run
    from peftkit.artifacts.vetting import vetted

    _genuine_is_vetted(bench)

    def load() -> dict[str, Any]:
        try:
            vetted(folder) if group != "loaded" else load_run(folder)
        except PeftkitError as error:
            return {"said": str(error)}
        return {"said": ""}

    found = apart(load, SECONDS, MEGABYTES)
    return found | {"outcome": _judged(found, group, message)}


def _judged(found: dict[str, Any], group: str, message: str) -> str:
    if message not in found.get("said", ""):
        return f"ended by {found['ended']}" if found["ended"] else "loads"
    is_within = found["cpu_seconds"] < LIMITS[0] and found["megabytes"] < LIMITS[1]
    return REFUSED if is_within or group == "loaded" else OVER


@cache
def _genuine_is_vetted(bench: Workbench) -> bool:
    from peftkit.artifacts.loading import load_run

    return load_run(subjects.peftkit_adapter(bench, "lora", 1)).model is not None


def _by_stock(bench: Workbench, folder: Path) -> dict[str, Any]:
    genuine = _genuine(bench)

    def load() -> dict[str, Any]:
        try:
            with subjects.silent(), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                model = subjects.stock_loaded(bench, folder)
                logits = subjects.outputs(model)
        except MemoryError:
            raise
        except Exception as error:
            return {"outcome": REFUSED, "said": f"{type(error).__name__}: {error}"}
        return {
            "outcome": _what_was_loaded(bench, model, logits, genuine),
            "warned": [str(one.message)[:100] for one in warned if one.category is UserWarning],
        }

    found = apart(load, SECONDS, MEGABYTES)
    if "outcome" not in found or "memory" in found["ended"] or "DefaultCPUAllocator" in found.get("said", ""):
        limit = f"{SECONDS:.0f} s" if found["ended"] == "time" else f"{MEGABYTES:,} MB"
        found["outcome"] = f"takes over {limit}"
    return found


@cache
def _genuine(bench: Workbench) -> Any:
    return subjects.outputs(subjects.stock_loaded(bench, subjects.peftkit_adapter(bench, "lora", 1) / "adapter"))


def _what_was_loaded(bench: Workbench, model: Any, logits: Any, genuine: Any) -> str:
    weights = dict(subjects.stock_base(bench).named_parameters())
    held = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    if any(name in held and not held[name].equal(p) for name, p in weights.items()):
        return "loads, and weights of the backbone are overwritten"
    if not logits.isfinite().all():
        return "loads, and computes NaN"
    return "loads, same result" if logits.equal(genuine) else "loads, other result"
