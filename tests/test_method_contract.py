"""The contract of a method, on every architecture; `docs/support.md` is written from what is found here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from architectures import SEQ2SEQ, SEQUENCE, TASKS, TOKEN, Place, save_checkpoint
from contract import Reloader, attached, check_cell
from contract_variants import VARIANTS, Variant
from support import PAGE, Found, agree, page

from peftkit.methods import METHODS


@pytest.fixture(scope="module")
def found() -> list[Found]:
    """What the cells found so far."""
    return []


TURNS = TASKS | {"t5": (SEQUENCE, SEQ2SEQ, TOKEN, SEQ2SEQ)}
"""With these every method meets text to text, on T5 or on BART."""


def grid() -> Iterator[tuple[Variant, str, str]]:
    """Every variant on every architecture; tasks take turns."""
    for row, variant in enumerate(VARIANTS):
        for column, architecture in enumerate(TASKS):
            turns = TURNS[architecture]
            yield variant, architecture, turns[(row + column) % len(turns)]


@pytest.mark.parametrize(
    ("variant", "architecture", "model_class"), [pytest.param(*cell, id=f"{cell[0].name}-{cell[1]}") for cell in grid()]
)
def test_contract(
    variant: Variant,
    architecture: str,
    model_class: str,
    contract_root: Path,
    tmp_path: Path,
    reloader: Reloader,
    found: list[Found],
    record_property: Callable[[str, object], None],
) -> None:
    places = [Place(architecture, one) for one in TASKS[architecture]]
    models = {place: attached(variant, place, save_checkpoint(place, contract_root)) for place in places}
    refused = {place.task: model for place, model in models.items() if isinstance(model, str)}
    possible = {place: model for place, model in models.items() if not isinstance(model, str)}
    merged = checkpointing = ""
    if possible:
        place = Place(architecture, model_class)
        place = place if place in possible else next(iter(possible))
        folder = tmp_path / "saved"
        merged, checkpointing = check_cell(
            variant, place, save_checkpoint(place, contract_root), folder, reloader, possible[place]
        )
    tasks = tuple(place.task for place in possible)
    cell = Found(variant.name, architecture, refused, tasks, merged, checkpointing)
    found.append(cell)
    record_property("support", vars(cell))


def test_every_method_is_in_the_grid() -> None:
    assert {variant.kind for variant in VARIANTS} == {kind for kind, method in METHODS.items() if method.trains}


def test_every_method_meets_every_task_and_every_architecture_meets_its_own() -> None:
    cells = list(grid())
    for architecture, tasks in TASKS.items():
        assert {task for _, one, task in cells if one == architecture} == set(tasks)
    for variant in VARIANTS:
        assert len({task for one, _, task in cells if one is variant}) == 4, variant.name


def test_the_page_says_what_the_cells_found(found: list[Found]) -> None:
    if len(found) < len(list(grid())):
        pytest.skip("only a part of the cells was run here, and held")
    assert agree(PAGE.read_text(encoding="utf-8"), page(found)), "docs/support.md is old: run `python tests/support.py`"
