"""A report as Markdown; what is only drawn is left to the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from peftkit.bench.document import Charts, Fold, Heading, Items, Links, Paragraph, Part, Table, cell

SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&])")


def markdown(parts: Iterable[Part]) -> str:
    """The whole file."""
    return "\n\n".join(text for part in parts for text in _texts(part)) + "\n"


def plain(text: str) -> str:
    """The text in one line, with what Markdown would read as its own escaped."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return SPECIAL.sub(r"\\\1", shown)


def _texts(part: Part) -> Iterator[str]:
    match part:
        case Heading():
            yield f"{'#' * part.level} {plain(part.text)}"
        case Paragraph():
            title = f"**{plain(part.title)}** " if part.title else ""
            yield f"{'> ' if part.box else ''}{title}{plain(part.text)}"
        case Items():
            yield "\n".join(f"- {plain(text)}" for text in part.texts)
        case Table():
            yield from [plain(part.caption)] if part.caption else []
            yield _table(part)
        case Fold():
            within = [text for one in part.parts for text in _texts(one)]
            yield from [f"**{plain(part.title)}**", *within] if within else []
        case Links() | Charts():
            return


def _table(part: Table) -> str:
    rows = [[cell(one) for one in row] for row in part.rows]
    lines = [
        _line(map(plain, part.head)),
        _line("---" if at in (0, *part.words) else "---:" for at in range(len(part.head))),
    ]
    for row in rows:
        lines.append(
            _line(_bold(plain(f"{one.text} ({one.below})" if one.below else one.text), one.tone) for one in row)
        )
    return "\n".join(lines)


def _bold(text: str, tone: str) -> str:
    return f"**{text}**" if tone == "chosen" and text else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
