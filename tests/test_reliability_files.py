"""Files that are damaged or mean harm, and numbers that are none: the short tier beside Trainer + peft."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.reliability import corruptions, hostile, not_numbers, payloads
from benchmarks.reliability.__main__ import RESULTS
from benchmarks.reliability.confined import Late, apart, within
from benchmarks.reliability.mutations import KINDS, NothingDone, mutate
from benchmarks.reliability.workbench import Workbench

PAGE = Path(__file__).parents[1] / "docs" / "reliability_files.md"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with Workbench(tmp_path_factory.mktemp("reliability")) as one:
        yield one


def outcomes(
    experiment: ModuleType, column: str, bench: Workbench, folder: Path, only: str = ""
) -> dict[str, dict[str, Any]]:
    found = {}
    for number, trial in enumerate(one for one in experiment.trials("short") if only in one):
        (folder / str(number)).mkdir()
        found[trial] = experiment.run(trial, column, bench, folder / str(number))
    return found


@pytest.mark.parametrize("experiment", [corruptions, hostile, payloads, not_numbers], ids=lambda one: one.__name__)
def test_of_peftkit_every_trial_is_good(experiment: ModuleType, bench: Workbench, tmp_path: Path) -> None:
    found = outcomes(experiment, "peftkit", bench, tmp_path)
    assert found
    assert {trial: row for trial, row in found.items() if row["outcome"] not in experiment.GOOD} == {}


def test_stock_loads_damaged_adapters_without_a_word(bench: Workbench, tmp_path: Path) -> None:
    found = outcomes(corruptions, "stock", bench, tmp_path, only="adapter/lora")
    counts = Counter(row["outcome"] for row in found.values())
    assert counts[corruptions.OTHER] >= 2
    assert found["adapter/lora/stale/0"]["outcome"] == corruptions.OTHER
    assert not counts[corruptions.HANGS]


def test_stock_overwrites_its_backbone(bench: Workbench, tmp_path: Path) -> None:
    found = outcomes(hostile, "stock", bench, tmp_path, only="a weight of")
    (row,) = found.values()
    assert row["outcome"] == "loads, and weights of the backbone are overwritten"


@pytest.mark.parametrize("form", payloads.FORMS)
def test_the_payload_would_run(form: str, tmp_path: Path) -> None:
    import torch

    file = tmp_path / "payload.pt"
    file.write_bytes(payloads.FORMS[form](tmp_path / "opened"))
    assert not (tmp_path / "opened").exists()
    if form == "pickle":
        pickle.loads(file.read_bytes()).close()
    else:
        torch.load(file, weights_only=False)["state"].close()
    assert (tmp_path / "opened").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_changes_what_is_said_and_leaves_no_whole_older_copy(kind: str, tmp_path: Path) -> None:
    names = ["one.json", "two.bin", "three.json"]
    for place, number in (("new", 1), ("old", 2)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "one.json").write_text(f'{{"a": {number}, "b": [1e-05, "x"]}}')
        (tmp_path / place / "two.bin").write_bytes(bytes([number]) * 700)
        (tmp_path / place / "three.json").write_text("[1]")
    before = {name: (tmp_path / "new" / name).read_bytes() for name in names}
    old = {name: (tmp_path / "old" / name).read_bytes() for name in names}
    for seed in range(20):
        mutation = mutate(tmp_path / "new", tmp_path / "old", names, kind, random.Random(seed))
        after = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        assert changed and changed <= set(mutation.files)
        assert after != old
        for name in after.keys() - before.keys():
            (tmp_path / "new" / name).unlink()
        for name, content in before.items():
            (tmp_path / "new" / name).write_bytes(content)


def test_damage_that_fits_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"")
    with pytest.raises(NothingDone, match="flip data fits none of one"):
        mutate(tmp_path, tmp_path, ["one"], "flip data", random.Random(0))


def test_a_process_apart_has_limits() -> None:
    assert apart(lambda: {"outcome": "done"}, 5, 100)["outcome"] == "done"
    assert apart(lambda: {"held": len(bytearray(10**9))}, 5, 100)["ended"] == "memory"
    assert apart(lambda: {"never": os.read(os.pipe()[0], 1)}, 0.2, 100)["ended"] == "time"
    with pytest.raises(Late):
        within(0.1, lambda: os.read(os.pipe()[0], 1))


def counted(experiment: str, column: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{experiment}.json").read_text(encoding="utf-8"))[column]
    return document


def test_the_page_says_what_was_counted() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for what, silently in (("checkpoints", "goes on"), ("adapters", "loads")):
        ours, theirs = (Counter(counted("corruptions", column)[what]["outcomes"]) for column in ("peftkit", "stock"))
        named = theirs[corruptions.REFUSED]
        silent = theirs[corruptions.SAME] + theirs[corruptions.OTHER]
        result = "to other weights" if what == "checkpoints" else "with other outputs"
        assert set(ours) <= {corruptions.PASSED, corruptions.REFUSED} and ours.total() == 616
        assert (
            f"| corrupted {what} | 616 | noticed 616, file named 616 | {theirs.total()} | noticed "
            f"{named + theirs[corruptions.UNNAMED]}, file named {named}; {silently} silently {silent}, "
            f"{result} {theirs[corruptions.OTHER]} |"
        ) in page
    theirs = Counter(counted("hostile", "stock")["outcomes"])
    loads, over = (sum(n for one, n in theirs.items() if one.startswith(start)) for start in ("loads", "takes over"))
    tried = theirs.total() - theirs["not offered"]
    refused = f"refused {theirs[hostile.REFUSED]}, loads {loads}, runs out of time or memory {over}"
    assert f"| hostile adapters | 48 | refused 48 | {tried} | {refused} |" in page
    assert counted("hostile", "peftkit")["outcomes"] == {hostile.REFUSED: 48}
    for column in ("peftkit", "stock"):
        assert payloads.EXECUTED not in counted("payloads", column)["outcomes"]
    assert counted("not_numbers", "peftkit")["outcomes"] == {not_numbers.STOPS: 192}
    assert counted("not_numbers", "stock")["outcomes"]["succeeds, loss logged as 0.0, saved NaN"] == 128
