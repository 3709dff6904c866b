"""HTML pages that need nothing else: escaped, without scripts, and with a policy that forbids any network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #b9c4cf; font-weight: 600; }
code { font-size: .85em; } text { font: 11px system-ui, sans-serif; fill: #44525f; }
"""
"""What every page has; a page adds its own below."""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole file. `body` is HTML already."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{safe(title)}</title><style>{STYLE}{style}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def safe(text: object) -> str:
    """Escaped, with what no HTML may hold as its escape."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in str(text))
    return escape(shown)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; every cell is escaped here."""
    head, *body = (f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead>{head.replace('td>', 'th>')}</thead><tbody>{''.join(body)}</tbody></table>"
