"""What is wrong with texts by themselves: empty, not text, strange characters."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from peftkit.audit.findings import Finding, counted, found_in
from peftkit.audit.settings import AuditSettings
from peftkit.data.rows import Rows

# fmt: off
READ_AS_MISSING = frozenset((
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
))
# fmt: on
"""What pandas.read_csv takes for missing unless told otherwise."""
OPTIONAL = 0.2
"""A column that is empty in a larger share of the rows is one that may be empty, such as an instruction's input."""
MOSTLY = 0.9
QUOTED = 0.2
STRANGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd\ud800-\udfff]")
LATIN_AS_UTF8 = re.compile(
    "[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€.|â‚¬|ðŸ..|(?:[ÐÑ][\x80-\xbf‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ€]){2}"
)
NUMBER = re.compile(r"\s*[-+]?[\d.,]+\s*")
KINDS = {
    "\x00": "nul-character",
    "\ufeff": "byte-order-mark",
    "\ufffd": "replacement-character",
}
WHAT = {
    "empty-text": "no text in '{column}'",
    "not-text": "'{column}' is not text",
    "nul-character": "a NUL in '{column}'",
    "byte-order-mark": "U+FEFF in '{column}'",
    "replacement-character": "U+FFFD in '{column}'",
    "control-character": "control characters in '{column}'",
    "lone-surrogate": "half a character in '{column}'",
    "mojibake": "text such as 'Ã©' in '{column}'",
    "long-text": "more than {limit:,} characters in '{column}'",
    "text-reads-as-missing": "'{column}' is a word such as NA or null",
}


@dataclass
class Scan:
    """The texts of one column: the rows with each fault, and how many are numbers or in quotes."""

    faults: dict[str, list[int]] = field(default_factory=dict)
    numbers: int = 0
    quoted: list[int] = field(default_factory=list)

    def add(self, name: str, index: int) -> None:
        self.faults.setdefault(name, []).append(index)


def flat(value: Any) -> str:
    """The text within a value: lists of words and the turns of a chat are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return " ".join(map(flat, value.values()))
    if isinstance(value, list | tuple):
        return " ".join(map(flat, value))
    return "" if value is None else str(value)


def digests(rows: Rows, columns: Sequence[str]) -> array[int]:
    """64 bits that tell the text of a row, but for its white space; 8 bytes a row."""
    return array("Q", (int.from_bytes(blake2b(text, digest_size=8).digest()) for text in _bytes(rows, columns)))


def row_key(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    """What makes two rows the same: the texts of all columns, but for white space."""
    return "\0".join(" ".join(flat(record.get(column)).split()) for column in columns)


def _bytes(rows: Rows, columns: Sequence[str]) -> Iterator[bytes]:
    for record in rows.records:
        yield row_key(record, columns).encode("utf-8", "surrogatepass")


def text_findings(split: str, rows: Rows, columns: Sequence[str], settings: AuditSettings) -> list[Finding]:
    """The faults of every text of a split."""
    scans = {column: scan([record.get(column) for record in rows.records], settings) for column in columns}
    return [one for column, found in scans.items() for one in _findings(split, rows, column, found, settings)]


def scan(values: Sequence[Any], settings: AuditSettings) -> Scan:
    """One pass over a column."""
    found = Scan()
    for index, value in enumerate(values):
        text = value if isinstance(value, str) else flat(value)
        if value is not None and not isinstance(value, str | list | tuple | Mapping):
            found.add("not-text", index)
            continue
        for name in text_faults(text, settings.long_text):
            found.add(name, index)
        if NUMBER.fullmatch(text[:40]):
            found.numbers += 1
        elif len(text) > 2 and text[0] == text[-1] == '"':
            found.quoted.append(index)
    return found


def text_faults(text: str, limit: int) -> list[str]:
    """The names of what is wrong with one text."""
    if not text or text.isspace():
        return ["empty-text"]
    faults = [] if text.isascii() and text.isprintable() else character_faults(text)
    if len(text) > limit:
        faults.append("long-text")
    elif len(text) < 12 and text.strip() in READ_AS_MISSING:
        faults.append("text-reads-as-missing")
    return faults


def character_faults(text: str) -> list[str]:
    """The names of what is wrong with the characters of a text."""
    names = dict.fromkeys(_kind(character) for character in STRANGE.findall(text))
    return [*names, *(["mojibake"] if is_mojibake(text) else [])]


def is_mojibake(text: str) -> bool:
    """Whether a piece of the text, saved in the encoding of Windows, reads as UTF-8."""
    return any(_reads_as_utf8(match.group()) for match in LATIN_AS_UTF8.finditer(text))


def _reads_as_utf8(piece: str) -> bool:
    # what Windows-1252 leaves undefined goes through as it is
    raw = b"".join(_byte(character) for character in piece)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1", "replace")


def _kind(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return "lone-surrogate"
    return KINDS.get(character, "control-character")


def _findings(split: str, rows: Rows, column: str, found: Scan, settings: AuditSettings) -> Iterator[Finding]:
    for name, indices in found.faults.items():
        if name == "empty-text" and len(indices) > OPTIONAL * len(rows):
            continue
        what = WHAT[name].format(column=column, limit=settings.long_text)
        yield from found_in(name, split, rows, indices, f"{counted(len(indices), 'row')}: {what}")
    if found.numbers > MOSTLY * len(rows):
        what = f"'{column}' holds numbers in {found.numbers:,} of {len(rows):,} rows"
        yield from found_in("numeric-text", split, rows, range(min(1, len(rows))), what)
    if len(found.quoted) > QUOTED * len(rows):
        what = f"'{column}' begins and ends with a quote in {len(found.quoted):,} of {len(rows):,} rows"
        yield from found_in("quoted-fields", split, rows, found.quoted, what)
