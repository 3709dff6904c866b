"""What differs between a run as it was begun and as it is to go on, by dotted name."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peftkit.errors import MOST_TOLD
from peftkit.schema import did_you_mean

DATA, WEIGHTS, PROCESSES = "data", "backbone.weights", "processes"
"""What is no setting: the encoded rows, the backbone's weight files, the number of processes."""
FIXED = ("method.kind", "training.optimizer", "training.precision", "training.keep_best")
"""Settings that nobody can allow to change, because what a checkpoint holds depends on them."""
UNSET = "not set"

IN_WORDS = {DATA: "data (rows, labels or tokenizer)", WEIGHTS: "backbone.weights (hash of the files)"}

Changes = dict[str, tuple[Any, Any]]
"""Name → what it was, and what it is."""


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested sections by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{name}.{inner}": one for inner, one in flat(value).items()}
        else:
            found[name] = value
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """What differs between two flat tables; a name that one of them lacks counts as not set."""
    names = dict.fromkeys([*before, *after])
    pairs = {name: (before.get(name, UNSET), after.get(name, UNSET)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def not_allowed(changes: Changes, allowed: Collection[str]) -> Changes:
    """The changes that nobody allowed by their name or by that of their section, and those that nobody can."""
    return {
        name: pair
        for name, pair in changes.items()
        if name in FIXED or not any(name == one or name.startswith(f"{one}.") for one in allowed)
    }


def told(changes: Changes) -> str:
    """Changes in words: `training.learning_rate: 0.01 → 0.5`."""
    return ", ".join(
        f"{IN_WORDS.get(name, name)}: {_short(old)} → {_short(new)}" for name, (old, new) in changes.items()
    )


def mend(changes: Changes) -> str:
    """How a run can go on in spite of changes."""
    if fixed := [name for name in changes if name in FIXED]:
        return f"{' and '.join(fixed)} cannot change within a run"
    return f"or allow what you meant to change: output.allow_changes: [{', '.join(changes)}]"


def unknown_names(allowed: Iterable[str], tree: Mapping[str, Any]) -> list[str]:
    """What is wrong with a list of names to allow, for a run of these settings."""
    known = [*flat(tree), DATA, WEIGHTS, PROCESSES]
    problems: list[str] = []
    for name in dict.fromkeys(allowed):
        if len(problems) == MOST_TOLD:
            break
        if name in FIXED:
            problems.append(f"{name} cannot change within a run")
        elif not any(one == name or one.startswith(f"{name}.") for one in known):
            problems.append(f"'{name}' is nothing that a run can differ in{did_you_mean(name, known)}")
    return problems


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
