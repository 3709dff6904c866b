"""How tags spell entities, word by word: BIO, IOB1, IO, IOBES and BILOU, read and written.

Reading is the same for all of them, as in the CoNLL evaluation (Tjong Kim Sang and De Meulder 2003): B, S and U start
an entity, S, U, E and L end one, and an I, E or L that continues nothing of its type starts one too. A tag without a
type (B, I, O) is of the type "".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

Span = tuple[str, int, int]
"""Type, first word, one past the last word."""
Scheme = Literal["bio", "iob1", "io", "iobes", "bilou"]

OUTSIDE = "O"
PREFIXES: dict[Scheme, str] = {"bio": "BI", "io": "I", "iob1": "BI", "iobes": "BEIS", "bilou": "BILU"}
"""The letters of each scheme; the order decides where tags fit several alike."""
ENTITY_TAG = re.compile(r"[BEILSU](?:-.+)?")


def type_of(tag: str) -> str:
    """PER, for B-PER."""
    return tag[2:]


def read_spans(tags: Sequence[str]) -> list[Span]:
    """The entities that the tags of one row spell, in any scheme."""
    spans: list[Span] = []
    kind, start, inside = "", 0, False
    for index, tag in enumerate([*tags, OUTSIDE]):
        continues = inside and tag[0] in "IEL" and type_of(tag) == kind
        if inside and not continues:
            spans.append((kind, start, index))
        if not continues:
            kind, start, inside = type_of(tag), index, tag != OUTSIDE
        if inside and tag[0] in "ESLU":
            spans.append((kind, start, index + 1))
            inside = False
    return spans


def write_tags(spans: Iterable[Span], words: int, scheme: Scheme) -> list[str]:
    """One tag for each of `words` words, from entities in their order that share no word."""
    tags = [OUTSIDE] * words
    for kind, first, end in spans:
        tail = f"-{kind}" if kind else ""
        touches = first > 0 and tags[first - 1] in (f"B{tail}", f"I{tail}")
        for index, letter in enumerate(_letters(end - first, scheme, touches), first):
            tags[index] = letter + tail
    return tags


def _letters(words: int, scheme: Scheme, touches: bool) -> str:
    """The letters of one entity; `touches`: the word before it belongs to another one of its type."""
    if scheme in ("iobes", "bilou"):
        alone, last = ("S", "E") if scheme == "iobes" else ("U", "L")
        return alone if words == 1 else f"B{'I' * (words - 2)}{last}"
    starts_with_b = scheme == "bio" or (scheme == "iob1" and touches)
    return f"{'B' if starts_with_b else 'I'}{'I' * (words - 1)}"


def tags_of_types(types: Iterable[str], scheme: Scheme) -> tuple[str, ...]:
    """Every tag that entities of these types can need: O first, then by type."""
    tails = [f"-{kind}" if kind else "" for kind in sorted(set(types))]
    return (OUTSIDE, *(f"{letter}{tail}" for tail in tails for letter in PREFIXES[scheme]))


def inside_of(tag: str, scheme: str) -> str:
    """The tag of what continues a word that has `tag`."""
    return tag if tag == OUTSIDE or scheme == "none" else f"I{tag[1:]}"


def contradictions(rows: Iterable[Sequence[str]], scheme: Scheme) -> int:
    """Tags that `scheme` would write differently for the same entities."""
    pairs = ((tags, write_tags(read_spans(tags), len(tags), scheme)) for tags in rows)
    return sum(one != other for tags, spelt in pairs for one, other in zip(tags, spelt, strict=True))


def detect(rows: Sequence[Sequence[str]]) -> tuple[Scheme, int] | None:
    """The scheme that entity tags contradict least, and how many do; None where no scheme has all their letters."""
    letters = {tag[0] for tags in rows for tag in tags if tag != OUTSIDE}
    fitting = [scheme for scheme, known in PREFIXES.items() if letters <= set(known)]
    counts = {scheme: contradictions(rows, scheme) for scheme in fitting}
    return min(counts.items(), key=lambda item: item[1], default=None)


def entity_spans(tags: Sequence[str], scheme: Scheme = "bio") -> list[Span]:
    """The entities that count in the scores: of IOBES and BILOU only those that are spelt right from first to last."""
    if scheme not in ("iobes", "bilou"):
        return read_spans(tags)
    from seqeval.scheme import BILOU, IOBES, Tokens

    found = Tokens(list(tags), scheme=IOBES if scheme == "iobes" else BILOU).entities
    # seqeval calls a type that has no name "_"
    return [("" if tags[one.start] in PREFIXES[scheme] else one.tag, one.start, one.end) for one in found]
