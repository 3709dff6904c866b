"""`docs/support.md`: what the contract found of every method on every architecture.

    python tests/support.py

runs the contract and writes the page, unless a cell fails. The contract itself fails when the page says something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
INTRODUCTION = """\
# Which method works where

This page is written by `python tests/support.py` from what `tests/test_method_contract.py` finds; that test fails when
the page says something else.

A cell of the first table is a method on a tiny random model of an architecture. It is attached for every task in the
second table, with exactly the parameters that were counted from shapes alone. With one of the tasks (they take turns
from cell to cell) "yes" means that

- it starts from the untouched model's function (virtual tokens and prefixes: from another one);
- all that it names, and the task's head, gets gradients and moves in training, and nothing else changes by a bit;
- the same seed gives the same weights, bit for bit;
- gradient checkpointing gives the same gradients, where transformers has it for the architecture;
- the saved file holds as many numbers as were counted beforehand;
- another process loads it over the untouched checkpoint, with another random head, and computes the same logits;
- the merged model has the names of the plain one and computes the same logits, or merging says why it cannot.

Where a cell has a note, the method refuses, before anything is trained, with the reason given below. The reasons are
those of {versions}.
"""
NOTES = "## Notes"
Notes = dict[str, int]


@dataclass(frozen=True)
class Found:
    """One cell: what the contract saw of a method on an architecture. Reasons are empty where there are none."""

    method: str
    architecture: str
    refused: Mapping[str, str]
    """Task → reason, for the tasks that it cannot be used with."""
    possible: tuple[str, ...]
    """The other tasks."""
    merged: str = ""
    checkpointing: str = ""


def page(cells: Iterable[Found]) -> str:
    """The whole document, methods and architectures in the order of the cells."""
    cells, notes = list(cells), Notes()
    by_place = {(cell.method, cell.architecture): cell for cell in cells}
    methods = list(dict.fromkeys(cell.method for cell in cells))
    architectures = list(dict.fromkeys(cell.architecture for cell in cells))
    rows = [
        [method, *(entry(by_place[method, one], notes) for one in architectures), merge_entry(method, cells, notes)]
        for method in methods
    ]
    tasks = [[one, ", ".join(tasks_of(one, cells)), checkpointing_entry(one, cells, notes)] for one in architectures]
    listed = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return "\n".join(
        [
            INTRODUCTION.format(versions=versions()),
            table(["method", *architectures, "merges"], rows),
            table(["architecture", "tasks", "gradient checkpointing"], tasks),
            f"{NOTES}\n\n{listed}\n",
        ]
    )


def agree(one: str, other: str) -> bool:
    """Whether two pages say the same. Reasons are compared where both are of the same versions: they quote peft."""
    if versions() in one and versions() in other:
        return one == other
    return one.partition("| method")[2].partition(NOTES)[0] == other.partition("| method")[2].partition(NOTES)[0]


def versions() -> str:
    """Of the libraries whose words are quoted."""
    return f"transformers {version('transformers')} and peft {version('peft')}"


def entry(cell: Found, notes: Notes) -> str:
    """`yes`, or the tasks that it refuses with the numbers of the reasons."""
    if not cell.refused:
        return "yes"
    numbers = dict.fromkeys(note(general(reason, cell.architecture), notes) for reason in cell.refused.values())
    marks = f"<sup>{', '.join(map(str, numbers))}</sup>"
    return f"no {marks}" if not cell.possible else f"not {', '.join(map(short, cell.refused))} {marks}"


def merge_entry(method: str, cells: Iterable[Found], notes: Notes) -> str:
    """`yes`, or the reason why the method has no merged form."""
    reasons = dict.fromkeys(cell.merged for cell in cells if cell.method == method and cell.possible and cell.merged)
    return f"no <sup>{', '.join(str(note(reason, notes)) for reason in reasons)}</sup>" if reasons else "yes"


def checkpointing_entry(architecture: str, cells: Iterable[Found], notes: Notes) -> str:
    """`yes`, or the reason why it cannot be, said of every method."""
    told = {cell.checkpointing for cell in cells if cell.architecture == architecture and cell.possible}
    return f"no <sup>{note(told.pop(), notes)}</sup>" if len(told) == 1 and "" not in told else "yes"


def tasks_of(architecture: str, cells: Iterable[Found]) -> list[str]:
    """All that the contract tries there."""
    ours = [cell for cell in cells if cell.architecture == architecture]
    return sorted({short(task) for cell in ours for task in (*cell.refused, *cell.possible)})


def general(reason: str, architecture: str) -> str:
    """The reason without the names of this very model, which the table tells; as Markdown."""
    return re.sub(rf"\b{architecture} \(\w+\)", "the model", reason).replace("<", r"\<")


def note(reason: str, notes: Notes) -> int:
    """The number of a reason, a new one if it was not given before."""
    return notes.setdefault(reason, len(notes) + 1)


def short(task: str) -> str:
    """The task in words."""
    names = {
        "SequenceClassification": "sequences",
        "TokenClassification": "tokens",
        "CausalLM": "language model",
        "Seq2SeqLM": "text to text",
    }
    return names[task]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Collector:
    """A pytest plugin that picks up what the cells found."""

    def __init__(self) -> None:
        self.cells: list[Found] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called after each phase of each test."""
        if report.when == "call":
            self.cells += [Found(**value) for name, value in report.user_properties if name == "support"]


def main() -> int:
    import pytest

    collector = Collector()
    tests = Path(__file__).with_name("test_method_contract.py")
    failed = pytest.main([str(tests), "-q", "--tb=short", "-p", "no:xdist", "-k", "test_contract"], plugins=[collector])
    if failed:
        print("the page stays as it is: a cell failed", file=sys.stderr)
        return int(failed)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(collector.cells), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
