"""Where the time of a step goes: operations of peftkit's own steps by kind, seen by torch's profiler.

    python -m benchmarks.speed.profile '{"config": …, "overrides": […], "steps": 12}'

is the process of one training. Times are of the thread that trains, which waits for others in products and kernels; the
profiler makes small operations longer, so that shares are what to read.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.gate import trained_here
from benchmarks.speed.processes import answer
from benchmarks.speed.results import Results
from benchmarks.speed.rounds import tell
from benchmarks.speed.workloads import Workload
from peftkit.environment import describe

SKIPPED = 3
"""First steps, in which things are set up."""
KINDS = {
    "products of matrices": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "attention": ("attend_in_row", "attend_in_row_backward", "_softmax", "_scaled_dot_product_flash_attention_for_cpu"),
    "activations and norms": ("gelu", "gelu_backward", "silu", "silu_backward", "native_layer_norm",
                              "native_layer_norm_backward", "tanh"),
    "sums and products, number by number": ("mul", "mul_", "addcmul", "addcmul_", "add", "add_", "sub_", "div", "sum"),
    "casts, copies, gathers": ("copy_", "cat", "index_select", "index_copy_", "fill_", "zero_", "index"),
    "dropout": ("drop", "add_dropped_", "random_", "ge_", "poisson", "index_fill_", "bernoulli_", "randint"),
}  # fmt: skip
OTHER, CALLS = "other operations", "Python and calls"


def profiled(workload: Workload, steps: int, work: Path, results: Results) -> dict[str, Any]:
    """Seconds a step by kind, for frozen weights in float32 and bfloat16."""
    results.set("environment", describe())
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        overrides = [*workload.settings("lora", steps + SKIPPED, work), f"backbone.dtype={dtype}"]
        found[dtype] = answer("profile", {"config": str(workload.file), "overrides": overrides, "steps": steps})
        tell(f"{dtype}: " + ", ".join(f"{kind} {1e3 * took:.0f} ms" for kind, took in found[dtype].items()))
    results.set("seconds", found)
    return found


def by_kind(events: dict[str, float], wall: float) -> dict[str, float]:
    """Seconds of each kind.

    Args:
        events: seconds by name that operations took themselves, without those that they call.
        wall: seconds of all.
    """
    kinds = {
        f"{space}::{name}": kind for kind, names in KINDS.items() for name in names for space in ("aten", "peftkit")
    }
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, took in events.items():
        if name.startswith(("aten::", "peftkit::")):
            found[kinds.get(name, OTHER)] += took
    return found | {CALLS: wall - sum(found.values())}


def _one(asked: dict[str, Any]) -> dict[str, float]:
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    seen, times = 0, [0.0, 0.0]

    def stepped(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == SKIPPED:
            profiler.start()
            times[0] = time.perf_counter()
        elif seen == SKIPPED + asked["steps"]:
            times[1] = time.perf_counter()
            profiler.stop()

    handle = register_optimizer_step_post_hook(stepped)
    try:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [*asked["overrides"], f"output.folder={Path(folder) / 'run'}"]
            trained_here(Path(asked["config"]), overrides, lambda model: None)
    finally:
        handle.remove()
    events = {one.key: one.self_cpu_time_total / 1e6 for one in profiler.key_averages()}
    return {kind: took / asked["steps"] for kind, took in by_kind(events, times[1] - times[0]).items()}


if __name__ == "__main__":
    print(json.dumps(_one(json.loads(sys.argv[1]))))
