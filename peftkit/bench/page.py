"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftkit.bench.document import Cell, Charts, Fold, Heading, Items, Links, Paragraph, Part, Table, cell
from peftkit.pages import document, safe

STYLE = """
body { max-width: 76rem; padding: 0 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin-bottom: .3rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-top: .6rem; border-top: 2px solid #dde4ea; font-size: 1.4rem; }
h3 { margin: 1.8rem 0 .4rem; font-size: 1.08rem; }
p { max-width: 60rem; margin: .5rem 0; } ul { max-width: 60rem; padding-left: 1.2rem; margin: .5rem 0; }
a { color: #2a5da8; text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin: 1rem 0; }
nav a { background: #eef3f8; border-radius: 1rem; padding: .12rem .8rem; }
.wide { overflow-x: auto; margin: .5rem 0 1.2rem; } .wide table { margin: 0; font-variant-numeric: tabular-nums; }
.above { color: #5d6b78; font-size: .92em; margin-bottom: -.2rem; }
td, th { padding: .26rem .5rem; vertical-align: top; white-space: nowrap; }
.word { text-align: left; } td.long { white-space: normal; min-width: 24rem; }
td:first-child, th:first-child { padding-left: .3rem; position: sticky; left: 0; background: #fff; }
th { vertical-align: bottom; font-size: .88em; color: #44525f; white-space: normal; }
tbody tr { border-bottom: 1px solid #edf1f4; } tbody tr:hover td { background: #f6f9fc; }
td small { display: block; color: #75828e; line-height: 1.25; }
.good { color: #1d7044; font-weight: 600; } .bad { color: #b03a2b; } .same { color: #2a5da8; }
.quiet { color: #8895a1; } .chosen { font-weight: 700; background: #e6f2ea; }
.box { border-left: 4px solid #8aa; border-radius: 0 .4rem .4rem 0; background: #f5f7f9; padding: .45rem .9rem;
  margin: .7rem 0; max-width: 60rem; }
.box p { margin: .15rem 0; }
.note { border-color: #4a90a4; } .warning { border-color: #d4a017; background: #fdf8ea; }
.advice { border-color: #2f8f6b; background: #eef7f2; }
.charts { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; margin: .6rem 0 1rem; }
svg text { paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .92em; margin-bottom: .15rem; }
svg { max-width: 100%; height: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; color: #2a5da8; padding: .15rem 0; }
@media print { details { display: block; } .wide { overflow: visible; } }
"""
LONG_TEXT = 40
"""A cell with more characters may break into lines."""


def page(title: str, parts: Iterable[Part]) -> str:
    """The whole file."""
    return document(title, STYLE, map(html, parts))


def html(part: Part) -> str:
    """One part; whatever it says is escaped."""
    match part:
        case Heading():
            anchor = f' id="{safe(part.anchor)}"' if part.anchor else ""
            return f"<h{part.level}{anchor}>{safe(part.text)}</h{part.level}>"
        case Paragraph():
            title = f"<b>{safe(part.title)}</b> " if part.title else ""
            text = f"<p>{title}{safe(part.text)}</p>"
            return f'<div class="box {part.box}">{text}</div>' if part.box else text
        case Items():
            return f"<ul>{''.join(f'<li>{safe(text)}</li>' for text in part.texts)}</ul>"
        case Links():
            links = (f'<a href="#{safe(to)}">{safe(text)}</a>' for text, to in part.targets)
            return f"<nav>{''.join(links)}</nav>"
        case Table():
            return _table(part)
        case Charts():
            drawn = (
                f"<figure><figcaption>{safe(above)}</figcaption>{svg}</figure>" for above, svg in part.drawn if svg
            )
            return f'<div class="charts">{"".join(drawn)}</div>'
        case Fold():
            state = " open" if part.open else ""
            return f"<details{state}><summary>{safe(part.title)}</summary>{''.join(map(html, part.parts))}</details>"


def _table(part: Table) -> str:
    above = f'<p class="above">{safe(part.caption)}</p>' if part.caption else ""
    head = "".join(
        f'<th class="word">{safe(name)}</th>' if at in part.words else f"<th>{safe(name)}</th>"
        for at, name in enumerate(part.head)
    )
    body = "".join(f"<tr>{_row(row, part.words)}</tr>" for row in part.rows)
    return f'{above}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Sequence[Cell | str], words: Sequence[int]) -> str:
    return "".join(_cell(cell(one), at in words) for at, one in enumerate(row))


def _cell(one: Cell, is_word: bool) -> str:
    wanted = (one.tone, "word" if is_word else "", "long" if len(one.text) > LONG_TEXT else "")
    classes = " ".join(filter(None, wanted))
    kind = f' class="{classes}"' if classes else ""
    below = f"<small>{safe(one.below)}</small>" if one.below else ""
    return f"<td{kind}>{safe(one.text)}{below}</td>"
