"""The report of an audit as one HTML file that needs nothing else.

Everything that comes from the data is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftkit.audit.outcome import Report, Shown, SplitReport
from peftkit.pages import document, safe, table

WIDTH, HEIGHT, GAP = 560, 140, 2
LABELS = 60
"""Labels that a chart shows."""
PLACES = 10
LONGEST = 3000
"""Characters of an example that are shown."""
STYLE = """
.finding { border-left: 4px solid #8aa; padding: .2rem .8rem; margin: .6rem 0; background: #f5f7f9; }
.error, .stop { border-color: #c0392b; } .warning { border-color: #d4a017; } .note { border-color: #4a90a4; }
.example { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7f9; padding: .5rem .8rem; margin: .5rem 0; }
mark { background: #c8ecd0; } mark sup { color: #1e6b34; } rect { fill: #4a78b5; }
"""


def page(report: Report, title: str) -> str:
    """A whole page."""
    parts = [
        f"<h1>{safe(title)}</h1>",
        "<h2>Findings</h2>",
        *(_finding(one) for one in _as_dicts(report)),
        "" if report.findings else "<p>No findings.</p>",
        *(f"<p>{safe(note)}</p>" for note in report.notes),
        "<h2>Splits</h2>",
        _figures(report.splits),
        *(_charts(split) for split in report.splits),
        "<h2>Examples</h2>" if report.examples else "",
        *(_example(one) for one in report.examples),
    ]
    return document(title, STYLE, parts)


def _as_dicts(report: Report) -> Iterable[dict[str, str]]:
    for one in report.findings:
        more = [f"and {one.count - PLACES:,} more"] if one.places and one.count > PLACES else []
        yield {
            "severity": one.severity,
            "name": one.name,
            "what": f"{one.split}: {one.what}; {one.mend}",
            "places": ", ".join([*one.places[:PLACES], *more]),
        }


def _finding(one: dict[str, str]) -> str:
    places = f"<br><code>{safe(one['places'])}</code>" if one["places"] else ""
    head = f"<b>{safe(one['name'])}</b> ({safe(one['severity'])})"
    return f'<div class="finding {safe(one["severity"])}">{head} {safe(one["what"])}{places}</div>'


def _figures(splits: Sequence[SplitReport]) -> str:
    names = ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max", "mean")
    rows = [
        [
            split.name,
            *(f"{one:,}" for one in (split.rows, split.examples, split.tokens)),
            *(f"{split.lengths[name]:,.1f}".removesuffix(".0") if split.lengths else "" for name in names),
            *(f"{one:,}" for one in (split.truncated, sum(split.dropped.values()), split.supervised, split.with_end)),
        ]
        for split in splits
    ]
    last = ("cut", "dropped", "tokens learnt", "end learnt")
    return table([["split", "rows", "examples", "tokens", *names, *last], *rows])


def _charts(split: SplitReport) -> str:
    lengths = [(f"{start:,}", count) for start, count in split.histogram]
    labels = sorted(split.labels.items(), key=lambda item: -item[1])[:LABELS]
    charts = f"<h3>{safe(split.name)}: tokens of an example</h3>{columns(lengths)}" if lengths else ""
    return charts + (f"<h3>{safe(split.name)}: labels</h3>{bars(labels)}" if labels else "")


def columns(values: Sequence[tuple[str, int]]) -> str:
    """Upright bars, one a value; some are named below."""
    most, width = max(count for _, count in values), WIDTH / len(values)
    parts = []
    for index, (name, count) in enumerate(values):
        height = HEIGHT * count / max(1, most)
        shape = f'x="{index * width:.1f}" y="{HEIGHT - height:.1f}" width="{width - GAP:.1f}" height="{height:.1f}"'
        parts.append(f"<rect {shape}><title>{safe(name)}: {count:,}</title></rect>")
        if index % 4 == 0:
            parts.append(f'<text x="{index * width:.1f}" y="{HEIGHT + 14}">{safe(name)}</text>')
    return f'<svg width="{WIDTH}" height="{HEIGHT + 20}" role="img">{"".join(parts)}</svg>'


def bars(values: Sequence[tuple[str, int]]) -> str:
    """Lying bars, one a label, with its name and its share."""
    most, total = max(1, *(count for _, count in values)), max(1, sum(count for _, count in values))
    parts = []
    for index, (name, count) in enumerate(values):
        top, width = index * 18, (WIDTH - 260) * count / most
        shown = name if len(name) <= 30 else f"{name[:29]}…"
        parts.append(f'<text x="0" y="{top + 12}">{safe(shown)}</text>')
        parts.append(f'<rect x="190" y="{top + 2}" width="{width:.1f}" height="13"></rect>')
        parts.append(f'<text x="{195 + width:.1f}" y="{top + 12}">{count:,} ({100 * count / total:.1f} %)</text>')
    return f'<svg width="{WIDTH}" height="{18 * len(values) + 4}" role="img">{"".join(parts)}</svg>'


def _example(example: Shown) -> str:
    return f'<code>{safe(example.where)}</code><div class="example">{"".join(_pieces(example))}</div>'


def _pieces(example: Shown) -> Iterable[str]:
    left = LONGEST
    for text, mark in example.pieces:
        label = "" if mark in ("", "learnt") else f"<sup>{safe(mark)}</sup>"
        shown = safe(text[:left])
        yield f"<mark>{shown}{label}</mark>" if mark else shown
        left = max(0, left - len(text))
