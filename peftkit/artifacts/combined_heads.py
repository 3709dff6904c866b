"""Which head a combination of runs gets: that of all where it is the same, else the one that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftkit.artifacts.combination import linear
from peftkit.artifacts.updates import Origin, Update
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "average"
Heads = dict[str, "Tensor"]


def chosen_heads(updates: Sequence[Update], weights: Sequence[float], choice: str | None) -> tuple[Heads, Origin, str]:
    """(values of the head, the run whose task it serves, whose it is in words).

    Args:
        choice: the number of a run, from 1, or `average`: the mean of all by their weights.

    Raises:
        UsageError: the heads differ and nothing was chosen, or they have no mean.
    """
    first, runs = updates[0], [one.origin for one in updates]
    if choice == AVERAGE:
        _check_mean(updates, weights)
        shares = [weight / sum(weights) for weight in weights]
        mean = linear([{name: value.double() for name, value in one.heads.items()} for one in updates], shares)
        return {name: value.float() for name, value in mean.items()}, first.origin, AVERAGE
    if choice is not None:
        index = _index(choice, len(runs))
        return updates[index].heads, runs[index], str(runs[index].folder)
    for other in updates[1:]:
        if why := head_difference(first, other):
            raise UsageError(
                f"{first.origin.folder} and {other.origin.folder} have different heads ({why}); choose one with "
                f"--head N, the number of the run whose head and task the result gets (1 to {len(runs)}), or "
                "--head average"
            )
    return first.heads, first.origin, "equal" if first.heads else "none"


def _index(choice: str, count: int) -> int:
    if not choice.isdecimal() or not 1 <= int(choice) <= count:
        raise UsageError(f"--head {choice}: give the number of a run, 1 to {count}, or average")
    return int(choice) - 1


def head_difference(one: Update, other: Update) -> str:
    """In what two heads differ; empty where they are the same."""
    import torch

    for name, value in vars(one.origin.head).items():
        if (its := getattr(other.origin.head, name)) != value:
            return f"{name}: {_short(value)} and {_short(its)}"
    if one.heads.keys() != other.heads.keys():
        return f"only one has {min(one.heads.keys() ^ other.heads.keys())}"
    changed = [name for name, value in one.heads.items() if not torch.equal(value, other.heads[name])]
    return f"other values of {changed[0]}" if changed else ""


def _check_mean(updates: Sequence[Update], weights: Sequence[float]) -> None:
    if min(weights) < 0:
        raise UsageError(
            "--head average is a mean by the weights, which negative ones do not have; choose a run's head"
        )
    first = updates[0]
    for other in updates[1:]:
        shapes = [{name: one.shape for name, one in side.heads.items()} for side in (first, other)]
        if first.origin.head != other.origin.head or shapes[0] != shapes[1]:
            raise UsageError(
                f"--head average: the heads of {first.origin.folder} and {other.origin.folder} are for other labels or "
                "of other shapes, and have no mean; choose a run's head by its number"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
