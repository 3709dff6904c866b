"""Labels as text: how a value of the data is one, and in which order they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

NUMBER = re.compile(r"-?\d+")


def label_text(value: Any) -> str | None:
    """A label as text, None where there is none; 3.0 from a table of floats is the label 3."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def distinct(names: tuple[str, ...] | None, field: str | None) -> tuple[str, ...] | None:
    """The names, where a setting gives any; raises ValueError unless they are two or more different ones."""
    if names is not None and (len(set(names)) != len(names) or len(names) < 2):
        raise ValueError(f"{field} must be two or more different names")
    return names


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different labels: whole numbers ascending, texts alphabetically."""
    texts = sorted(set(labels))
    if all(NUMBER.fullmatch(text) for text in texts):
        texts.sort(key=int)
    return tuple(texts)


def by_position(texts: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Labels in the configuration's names: numbers in the data are positions where it has only names."""
    if not names or any(NUMBER.fullmatch(name) for name in names):
        return list(texts)
    positions = {str(position): name for position, name in enumerate(names)}
    return [positions.get(text, text) for text in texts]
