"""What all configuration sections share, and the search for the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

MOST_NAME = 200
"""Characters of a name that is worth a search for the one that was meant, which takes its length times theirs."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """What a file says, with what it may leave out because of what else it says."""
        return tree


def changed(section: BaseModel, *names: str) -> list[str]:
    """Those of the fields that hold something else than their defaults, however they came to it: the resolved settings
    in a run folder spell out every field."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].get_default(call_default_factory=True)]


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that fewest slips of a finger turn into `name`, or None when none is alike.

    A candidate is alike when one slip in three letters explains the difference, or its difflib ratio is `cutoff`
    or more. Of candidates with equally many slips, one of the same letters wins, and then the greater ratio.
    """
    if len(name) > MOST_NAME:
        return None
    written, ranked = _fold(name), []
    for candidate in candidates:
        known = _fold(candidate)
        distance, ratio = slips(written, known), difflib.SequenceMatcher(None, name, candidate).ratio()
        if distance <= max(1, len(name) // 3) < len(name) or ratio >= cutoff:
            ranked.append((distance, sorted(written) != sorted(known), -ratio, candidate))
    return min(ranked)[-1] if ranked else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the whole choice when nothing is alike."""
    choice = sorted(candidates)
    match = nearest(name, choice)
    return f"; did you mean '{match}'?" if match else f"; it can be: {', '.join(choice)}"


def alike(name: str, candidates: Iterable[str], listed: Iterable[str]) -> str:
    """The candidates most like `name`, or what is `listed` when none is alike."""
    found = difflib.get_close_matches(name, dict.fromkeys(candidates), n=3)
    if found:
        return f"; did you mean {' or '.join(repr(match) for match in found)}?"
    return f"; it can be: {', '.join(listed)}"


def shown(text: str, most: int = 100) -> str:
    """A text for a message: at most so long, and without characters that a terminal would act on."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in short)


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")


def slips(one: str, other: str) -> int:
    """Letters left out, added, replaced, or swapped with their neighbour (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, wanted in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
