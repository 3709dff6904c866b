"""docs/speed.md and its chart, from what is kept of the workloads; and the table of docs/engine.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.speed.arms import BASE, FULL, PEFTKIT, TUNED, Arm, arms_of
from benchmarks.speed.chart import draw
from benchmarks.speed.floor import listed
from benchmarks.speed.results import medians
from benchmarks.speed.workloads import ROOT, WORKLOADS
from peftkit.disk import write_text

DOCS = ROOT / "docs"
PAGE, CHART = "speed.md", "speed.svg"
ENGINE = ("<!-- made by benchmarks.speed: sst2 -->", "<!-- end -->")
"""Around the table of docs/engine.md."""
TARGETS = {
    "sst2": (5.0, 2.0, 0.45, 0.7),
    "tweet_emotion": (5.0, 2.0, 0.45, 0.7),
    "wnut17": (5.0, 2.0, 0.45, 0.7),
    "gsm8k": (4.0, None, 0.6, 0.5),
    "reuters_r8": (2.5, None, 0.6, 0.7),
    "random_bert": (2.5, None, 0.6, 0.5),
}
"""Of each workload: times the speed of stock at its defaults and tuned, share of the floor's speed (at least), and
share of stock's memory (at most)."""
TRL, OF_TRL = "TRL SFTTrainer, tuned", 1.5
OF_FULL = 0.72
"""A LoRA step's share of the time of a step of full fine-tuning, both peftkit's, at most."""


def write(results: Path, docs: Path = DOCS) -> list[Path]:
    """Write the page, the chart, and, where SST-2 is measured, the table of docs/engine.md; returns the files."""
    kept = {name: _read(results / f"{name}.json") for name in WORKLOADS}
    kept = {name: one for name, one in kept.items() if one and one.get("arms")}
    written = [docs / PAGE]
    write_text(docs / PAGE, page(kept, results))
    if kept:
        draw({WORKLOADS[name].title: medians(one) for name, one in kept.items()}, docs / CHART)
        written.append(docs / CHART)
    if "sst2" in kept and (docs / "engine.md").is_file():
        text = (docs / "engine.md").read_text(encoding="utf-8")
        start, end = (text.find(mark) for mark in ENGINE)
        if 0 <= start < end:
            lines = "\n".join(["", *table(kept["sst2"]), "", *_circumstances(kept["sst2"]), ""])
            write_text(docs / "engine.md", text[: start + len(ENGINE[0])] + lines + text[end:])
            written.append(docs / "engine.md")
    return written


def page(kept: dict[str, Any], results: Path) -> str:
    """The whole document."""
    lines = ["# Speed and memory", "", "Written by `python -m benchmarks.speed --report` from "]
    lines[-1] += "[`benchmarks/results/speed/`](../benchmarks/results/speed/)."
    lines += ["", *_method()]
    lines += ["", f"![times the speed of {BASE}]({CHART})"] if kept else ["", "Nothing is measured yet."]
    if kept:
        lines += ["", "## What was aimed at", "", *targets(kept)]
    for name, one in kept.items():
        lines += ["", f"## {WORKLOADS[name].title}", "", *table(one), "", *_notes(one)]
    if gates := _finished(results, "gate", "passes"):
        lines += ["", "## Losses and gradients beside stock", "", *_gates(gates)]
    if curves := _read(results / "scaling.json"):
        lines += ["", "## Time and memory against length, batch, rank and width", "", *_curves(curves)]
    compared = {name: _read(results / f"seeds-{name}.json") for name in WORKLOADS}
    if any(compared.values()):
        lines += ["", "## Final scores with dropout", "", *_seeds({n: one for n, one in compared.items() if one})]
    if profiles := _finished(results, "profile", "seconds"):
        lines += ["", "## Where the time of a step goes", "", *_profiles(profiles)]
    if at_once := _finished(results, "together", "gain"):
        lines += ["", "## Many runs at once", "", *_at_once(at_once)]
    return "\n".join(lines) + "\n"


def table(kept: dict[str, Any]) -> list[str]:
    """The arms of one workload, with what is missing and why."""
    found, floors = medians(kept), kept.get("floor", {})
    base = found.get(BASE)
    rows = [
        ["arm", "real tokens/s", f"against {BASE}", "step, s", "MiB over the bare process", "against", "of the floor"],
        ["---", *["---:"] * 6],
    ]
    for arm in arms_of(WORKLOADS[kept["asked"]["workload"]], kept["held"]):
        if one := found.get(arm.name):
            rate, size = one["tokens_per_second"], one["growth_bytes"]
            against = f"{rate / base['tokens_per_second']:.2f} ×" if base else ""
            share = f"{100 * size / base['growth_bytes']:.0f} %" if base else ""
            step, floor = f"{one['step_seconds']:.3f}", _of_floor(arm, rate, floors)
            rows.append([arm.name, f"{rate:,.0f}", against, step, f"{size / 2**20:,.0f}", share, floor])
        elif arm.name in kept.get("missing", {}):
            rows.append([arm.name, "missing", *[""] * 5])
    return [f"| {' | '.join(row)} |" for row in rows]


def targets(kept: dict[str, Any]) -> list[str]:
    """What was aimed at, and whether it was reached, of every workload that is measured."""
    lines = ["| workload | aim | reached | |", "| --- | --- | ---: | --- |"]
    for name, one in kept.items():
        found, floors = medians(one), one.get("floor", {})
        if PEFTKIT.name not in found:
            continue
        own = found[PEFTKIT.name]
        stock, tuned, floor, memory = TARGETS[name]
        aims: list[tuple[str, float | None, float | None, bool]] = [
            (f"times {BASE}", stock, _ratio(own, found.get(BASE), "tokens_per_second"), True),
            (f"times {TUNED}", tuned, _ratio(own, found.get(TUNED), "tokens_per_second"), True),
            (f"times {TRL}", OF_TRL, _ratio(own, found.get(TRL), "tokens_per_second"), True),
            ("of the bfloat16 floor's speed", floor, _share(own["tokens_per_second"], floors), True),
            (f"of the memory of {BASE}", memory, _ratio(own, found.get(BASE), "growth_bytes"), False),
            ("of a step of full fine-tuning", OF_FULL, _ratio(own, found.get(FULL), "step_seconds"), False),
        ]  # fmt: skip
        for what, aim, reached, is_least in aims:
            if aim is not None and reached is not None:
                met = reached >= aim if is_least else reached <= aim
                sign = "≥" if is_least else "≤"
                lines.append(f"| {name} | {sign} {aim:g} {what} | {reached:.2f} | {'yes' if met else 'no'} |")
    return lines


def _method() -> list[str]:
    return [
        "Each arm trains in a process of its own, in turn with the others, each round beginning with another; figures",
        "are medians over rounds. All take the same batches of the same tokens from the same first weights, with the",
        "same optimizer and schedule; tuned arms group examples by length, hold weights in bfloat16 under autocast and",
        "use the attention that was fastest. Tokens are real ones; times are of all steps but the first, memory is the",
        "peak of the process over what was resident before the backbone was loaded. The floor is all arithmetic at the",
        "measured matrix rate in bfloat16, plus the bytes that must move at the measured bandwidth.",
    ]


def _circumstances(kept: dict[str, Any]) -> list[str]:
    environment = kept["environment"]
    versions = ", ".join(f"{name} {found}" for name, found in environment["versions"].items())
    lines = [f"`{kept['command']}`: {environment['processor']}, {environment['threads']} threads; {versions}."]
    lines += [f"`{PEFTKIT.name}` has frozen weights in {kept['held']} there."]
    return lines + ([f"{kept['note']}."] if kept.get("note") else [])


def _notes(kept: dict[str, Any]) -> list[str]:
    lines = _circumstances(kept)
    if tried := kept.get("attention"):
        seconds = ", ".join(f"{name} {took:.3f} s" for name, took in tried["seconds"].items())
        lines.append(f"Tuned arms attend with {tried['attention']} ({seconds} a step).")
    lines += [f"{arm} is missing: {why.splitlines()[0]}" for arm, why in kept.get("missing", {}).items()]
    if floors := kept.get("floor"):
        lines += ["", "```", *listed(floors["lora"], floors["step_tokens"]), "```"]
    return lines


def _gates(found: dict[str, Any]) -> list[str]:
    lines = []
    for one in found.values():
        lines += [f"`{one['command']}`, without dropout, beside {BASE} in float32:", ""]
        lines += ["| | largest difference of a loss | least cosine of gradients | kept for backward, MiB | |"]
        lines += ["| --- | ---: | ---: | ---: | --- |"]
        for setting, row in one["settings"].items():
            verdict = ("passes" if row["passes"] else "fails") if row["is_gated"] else "measured"
            apart, cosine = f"{row['largest_loss_difference']:.1e}", f"{row['least_cosine']:.7f}"
            lines.append(f"| {setting} | {apart} | {cosine} | {row['kept_bytes'] / 2**20:,.1f} | {verdict} |")
        lines.append("")
    return lines[:-1]


def _seeds(found: dict[str, Any]) -> list[str]:
    lines = [
        "| workload | pair | difference | 95 % interval | p | within 0.01 |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for name, one in found.items():
        for pair in one.get("compared", {}).get("pairs", []):
            interval = f"{pair['low']:+.4f} … {pair['high']:+.4f}"
            cells = [name, f"{pair['first']} − {pair['second']}", f"{pair['difference']:+.4f}", interval]
            lines.append(f"| {' | '.join([*cells, format(pair['p_value'], '.2f'), pair['verdict']])} |")
    return lines


def _profiles(found: dict[str, Any]) -> list[str]:
    lines = ["Of the thread that trains; the profiler makes small operations longer."]
    for name, kept in found.items():
        kinds = {dtype: one.items() for dtype, one in kept["seconds"].items()}
        lines += ["", f"| {name} | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
        for rows in zip(*kinds.values(), strict=True):
            shares = [f"{100 * took / sum(kept['seconds'][dtype].values()):.0f} %"
                      for dtype, (_, took) in zip(kinds, rows, strict=True)]  # fmt: skip
            lines.append(f"| {rows[0][0]} | {' | '.join(shares)} |")
        lines += ["", f"`{kept['command']}`"]
    return lines


def _at_once(found: dict[str, Any]) -> list[str]:
    lines = ["| workload | runs | at a time | threads each | real tokens/s of all | s with start-up | MiB of all |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, kept in found.items():
        for one in (kept["one after the other"], kept["together"]):
            figures = f"{one['tokens_per_second']:,.0f} | {one['wall_seconds']:,.0f} | {one['held_bytes'] / 2**20:,.0f}"
            lines.append(f"| {name} | {kept['asked']['runs']} | {one['at_once']} | {one['threads']} | {figures} |")
    for kept in found.values():
        apart = "losses differ, from the lowest rate to the highest, by at most " + ", ".join(
            f"{one:.0e}" for one in kept["largest_loss_differences"]
        )
        gain = (
            f"{kept['gain']:.2f} times the speed, {kept['gain_with_start']:.2f} with start-ups, and "
            f"{kept['memory']:.2f} times the memory of one, libraries included"
        )
        lines += ["", f"`{kept['command']}`: {gain}; {apart}."]
    return lines


def _curves(found: dict[str, Any]) -> list[str]:
    lines = [f"`{found['command']}`; expected is what `peftkit plan` says.", ""]
    lines += [
        "| | | step, s | expected | MiB over the bare process | expected |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found.get("curves", []):
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("growth_bytes", "expected_bytes")]
        times = [f"{row[key]:.3f}" for key in ("step_seconds", "expected_step_seconds")]
        lines.append(f"| {row['axis']} | {row['value']} | {' | '.join([*times, *sizes])} |")
    return lines


def _of_floor(arm: Arm, rate: float, floors: dict[str, Any]) -> str:
    share = _share(rate, floors, arm.method)
    return f"{100 * share:.0f} %" if share is not None else ""


def _share(rate: float, floors: dict[str, Any], method: str = "lora") -> float | None:
    """Of the speed of the bfloat16 floor; None for methods that have none."""
    return rate / floors[method]["bfloat16"]["tokens_per_second"] if method in floors else None


def _ratio(own: dict[str, float], other: dict[str, float] | None, what: str) -> float | None:
    return own[what] / other[what] if other else None


def _finished(results: Path, what: str, last: str) -> dict[str, Any]:
    """The measurements of a kind by workload that have come to their `last` figure."""
    found = {name: _read(results / f"{what}-{name}.json") for name in WORKLOADS}
    return {name: one for name, one in found.items() if one and last in one}


def _read(file: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found
