"""Whether results may stand in one table: the same versions, code and machine for all, and the same rows for a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peftkit.bench.store import Record
from peftkit.errors import UsageError

MACHINE = ("processor", "cores", "threads", "gpus", "cuda", "platform", "python")
NOT_RECORDED = "not recorded"


def described(record: Record) -> dict[str, str]:
    """What decides on a result or its cost beside the configuration: versions, code, machine."""
    versions = {f"version of {name}": value for name, value in sorted(record.versions.items())}
    machine = {name: _shown(record.environment.get(name)) for name in MACHINE}
    return versions | {"code": record.code[:12] or NOT_RECORDED} | machine


def differing(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """What is not the same in all records → value → how many have it, most first."""
    all_described = [described(record) for record in records]
    names = dict.fromkeys(name for one in all_described for name in one)
    counted = {name: Counter(one.get(name, NOT_RECORDED) for one in all_described) for name in names}
    return {
        name: dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))
        for name, values in counted.items()
        if len(values) > 1
    }


def refuse_mixed(folder: Path, differences: dict[str, dict[str, int]]) -> None:
    """Raise UsageError that names every difference, if there is any."""
    if differences:
        told = "; ".join(in_words(differences))
        raise UsageError(
            f"{folder}: finished runs differ in {told}. Such results do not compare: run the grid again in one place, "
            "or ask for a report of them all with --mixed, which says what differs"
        )


def in_words(differences: dict[str, dict[str, int]]) -> Iterator[str]:
    """`torch: 2.13 (40 runs), 2.12 (2 runs)`, one for each difference."""
    for name, values in differences.items():
        yield f"{name}: {', '.join(f'{value} ({runs(count)})' for value, count in values.items())}"


def runs(count: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} run{'' if count == 1 else 's'}"


def different_data(finals: Sequence[Record]) -> list[int]:
    """Seeds of one block whose methods were not trained on the same tokens and labels; prompting, which trains nothing,
    may have solved rows in front of them."""
    hashes: dict[int, set[str]] = {}
    for record in finals:
        if not record.trainable_parameters:
            continue
        hashes.setdefault(record.key.seed, set()).add(record.data_sha256)
    return sorted(seed for seed, found in hashes.items() if len(found) > 1)


def _shown(value: object) -> str:
    if value is None or value == "":
        return NOT_RECORDED
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
