"""Checkpoints on disk: what is read after damage, what stays, and what a run may change when it goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.cli import main
from peftkit.config import TrainingSettings
from peftkit.errors import ArtifactError
from peftkit.methods import HeadOnly
from peftkit.training import checkpoint
from peftkit.training.checkpoint import FILES, Checkpoints, Progress
from peftkit.training.loop import _Loop
from peftkit.training.optimizer import Moments, Position, make_optimizer, make_schedule
from peftkit.training.random_state import random_state

SETTINGS = {"training": {"learning_rate": 0.1, "seed": 1}, "method": {"kind": "head"}}
FRESH = Progress(SETTINGS, "data", "weights", 1)
MANIFEST = "manifest.json"


class Training:
    """A layer, and what trains it."""

    def __init__(self, folder: Path, learning_rate: float = 0.1) -> None:
        settings = TrainingSettings(learning_rate=learning_rate)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = make_optimizer(self.model, settings, HeadOnly())
        self.schedule = make_schedule(self.optimizer, settings, 10)
        states = {"optimizer": Moments(self.optimizer), "schedule": Position(self.schedule)}
        self.checkpoints = Checkpoints(folder, self.model, HeadOnly(), states)
        self.step = 0

    def advance(self) -> None:
        """A step, and its checkpoint."""
        self.model(torch.ones(1, 3)).square().sum().backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def save(self, best_step: int = 0) -> None:
        self.checkpoints.save(replace(FRESH, step=self.step, best_step=best_step), [random_state()])

    def weights(self) -> list[float]:
        return [float(one) for p in self.model.parameters() for one in p.detach().flatten()]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[int, list[float]]]:
    """A folder with the checkpoints of steps 1, which was the best, and 2; and the weights of both."""
    training = Training(tmp_path / "checkpoints")
    training.advance()
    weights = {1: training.weights()}
    training.checkpoints.save_best(1)
    training.save(best_step=1)
    training.advance()
    weights[2] = training.weights()
    training.save(best_step=1)
    assert names(tmp_path / "checkpoints") == ["best-1.safetensors", "step-1", "step-2"]
    return tmp_path / "checkpoints", weights


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def link(file: Path) -> None:
    shutil.move(file, file.parents[2] / file.name)
    file.symlink_to(file.parents[2] / file.name)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def stale(file: Path) -> None:
    shutil.copy(file.parents[1] / "step-1" / file.name, file)


@pytest.mark.parametrize("damage", [remove, empty, cut, flip, link, pipe], ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_the_newest_that_is_whole_is_read(
    name: str, damage: Callable[[Path], None], written: tuple[Path, dict[int, list[float]]]
) -> None:
    folder, weights = written
    damage(folder / "step-2" / name)
    again = Training(folder)
    found = again.checkpoints.load(FRESH, 0)
    assert found is not None
    assert (found.step, again.weights()) == (1, weights[1])
    (reason,) = again.checkpoints.passed_over
    assert str(folder / "step-2" / name) in reason


@pytest.mark.parametrize("name", ["trained.safetensors", "states.safetensors", "progress.json", MANIFEST])
def test_a_file_of_an_older_checkpoint_is_noticed(name: str, written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    stale(folder / "step-2" / name)
    again = Training(folder).checkpoints
    found = again.load(FRESH, 0)
    assert found is not None and found.step == 1
    assert "step-2" in again.passed_over[0]
    assert name in again.passed_over[0]


def test_a_checkpoint_under_another_name_is_noticed(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    shutil.copytree(folder / "step-1", folder / "step-3")
    again = Training(folder).checkpoints
    found = again.load(FRESH, 0)
    assert found is not None and found.step == 2
    (reason,) = again.passed_over
    assert reason == f"{folder / 'step-3'} is the checkpoint of step 1 under another name, or has its manifest.json"


def test_files_that_nobody_wrote_are_noticed(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    (folder / "step-2" / "optimizer.pt").write_bytes(b"\x80\x05.")
    (folder / "step-7").write_text("no folder")
    (folder / "step-x").mkdir()
    again = Training(folder).checkpoints
    found = again.load(FRESH, 0)
    assert found is not None and found.step == 1
    assert "step-7 is no folder" in again.passed_over[0]
    assert "optimizer.pt is none of its files" in again.passed_over[1]


@pytest.mark.parametrize("damage", [remove, cut, flip], ids=lambda one: one.__name__)
def test_the_best_weights_belong_to_the_checkpoint(
    damage: Callable[[Path], None], written: tuple[Path, dict[int, list[float]]]
) -> None:
    folder, _ = written
    damage(folder / "best-1.safetensors")
    with pytest.raises(ArtifactError) as caught:
        Training(folder).checkpoints.load(FRESH, 0)
    assert str(caught.value).count("best-1.safetensors") == 2  # both checkpoints mean it
    assert "no checkpoint in" in str(caught.value)


def test_where_none_is_whole_each_is_named_and_nothing_removed(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    flip(folder / "step-1" / "trained.safetensors")
    cut(folder / "step-2" / "random.json")
    with pytest.raises(
        ArtifactError, match=r"(?s)step-2/random\.json has .*step-1/trained\.safetensors changed"
    ) as told:
        Training(folder).checkpoints.load(FRESH, 0)
    assert "output.overwrite=true" in str(told.value)
    assert {"step-1", "step-2"} <= set(names(folder))


def test_two_stay_and_a_damaged_one_goes_when_a_newer_is_whole(
    written: tuple[Path, dict[int, list[float]]],
) -> None:
    folder, _ = written
    flip(folder / "step-2" / "states.json")
    again = Training(folder)
    assert again.checkpoints.load(FRESH, 0) is not None
    again.step = 1
    assert names(folder) == ["best-1.safetensors", "step-1", "step-2"]
    again.advance()
    again.advance()
    again.checkpoints.save_best(3)
    again.save(best_step=3)
    assert names(folder) == ["best-1.safetensors", "best-3.safetensors", "step-1", "step-3"]
    again.advance()
    again.save(best_step=3)
    assert names(folder) == ["best-3.safetensors", "step-3", "step-4"]


def test_nothing_goes_before_the_new_one_was_read_back(
    written: tuple[Path, dict[int, list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = written
    again = Training(folder)
    assert again.checkpoints.load(FRESH, 0) is not None
    again.step = 2
    again.advance()
    whole = checkpoint.whole_folder

    @contextmanager
    def losing_a_bit(final: Path) -> Iterator[Path]:
        with whole(final) as partial:
            yield partial
        flip(final / "trained.safetensors")

    monkeypatch.setattr(checkpoint, "whole_folder", losing_a_bit)
    with pytest.raises(ArtifactError, match=r"trained\.safetensors changed"):
        again.save(best_step=1)
    assert {"step-1", "step-2"} <= set(names(folder))


def test_what_a_killed_process_left_is_swept(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    shutil.copytree(folder / "step-1", folder / ".step-3.partial")
    shutil.copytree(folder / "step-1", folder / ".step-1.removed")
    (folder / ".best-3.safetensors.partial").write_text("half")
    Training(folder).checkpoints.load(FRESH, 1)
    assert len(names(folder)) == 6  # another process than the first clears nothing up
    Training(folder).checkpoints.load(FRESH, 0)
    assert names(folder) == ["best-1.safetensors", "step-1", "step-2"]


CHANGED = replace(
    FRESH,
    settings={"training": {"learning_rate": 0.2, "seed": 1}, "method": {"kind": "head", "layers": 2}},
    data="others",
    weights="others",
    processes=2,
)


def test_every_difference_is_named(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    with pytest.raises(ArtifactError) as caught:
        Training(folder).checkpoints.load(CHANGED, 0, ["training"])
    told = str(caught.value)
    assert "step-2 is of another run: data (rows, labels or tokenizer): data → others" in told
    assert "backbone.weights (hash of the files): weights → others, processes: 1 → 2" in told
    assert "method.layers: not set → 2" in told
    assert "training.learning_rate" not in told
    assert "output.allow_changes: [data, backbone.weights, processes, method.layers]" in told


def test_what_is_allowed_changes_and_is_noted(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, weights = written
    again = Training(folder, learning_rate=0.2)
    allowed = ["training.learning_rate", "method.layers", "data", "backbone.weights", "processes"]
    found = again.checkpoints.load(CHANGED, 1, allowed)
    assert found is not None
    assert (found.settings, found.processes, again.weights()) == (CHANGED.settings, 2, weights[2])
    assert {one["name"]: (one["step"], one["before"], one["after"]) for one in found.changes} == {
        "training.learning_rate": (2, 0.1, 0.2),
        "method.layers": (2, "not set", 2),
        "data": (2, "data", "others"),
        "backbone.weights": (2, "weights", "others"),
        "processes": (2, 1, 2),
    }
    # linear over 10 steps, of which 2 are done, from the new rate
    assert {group["lr"] for group in again.optimizer.param_groups} == {0.2 * ((10 - 2) / 10)}
    again.schedule.step()
    assert again.optimizer.param_groups[0]["lr"] == 0.2 * ((10 - 3) / 10)
    assert again.optimizer.state_dict()["state"][0]["step"] == 2


def test_what_cannot_change_is_not_allowed_by_any_name(written: tuple[Path, dict[int, list[float]]]) -> None:
    folder, _ = written
    other = replace(FRESH, settings=SETTINGS | {"method": {"kind": "full"}})
    with pytest.raises(ArtifactError, match=r"method\.kind: head → full; .*method\.kind cannot change within a run"):
        Training(folder).checkpoints.load(other, 0, ["method"])


# --- a whole run --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a run that was ended after the checkpoint of step 4."""
    training = {"learning_rate": 0.01, "max_steps": 10, "evaluate_every": 4, "batch_size": 16, "seed": 1}
    config = write_config(training=training)
    save = _Loop._save

    def interrupt(loop: Any) -> None:
        save(loop)
        loop.accelerator.run_lock.release()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "_save", interrupt)
        assert main(["train", str(config)]) == 130
    return config


def events(folder: Path, key: str) -> list[Any]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event[key] for event in map(json.loads, lines) if key in event]


def test_a_changed_learning_rate_takes_effect_where_it_is_allowed(
    interrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change = "training.learning_rate=0.5"
    assert main(["train", str(interrupted), change, "output.allow_changes=[training.seed]"]) == 2
    assert "training.learning_rate: 0.01 → 0.5" in capfd.readouterr().err
    assert main(["train", str(interrupted), change, "output.allow_changes=[training.learning_rate]"]) == 0
    assert "continuing from step 4 of 10 with changes: training.learning_rate: 0.01 → 0.5" in capfd.readouterr().out
    expected = [(0.01 if step < 4 else 0.5) * (10 - step) / 10 for step in range(10)]
    assert events(tmp_path / "run", "learning_rate") == pytest.approx(expected, rel=1e-12)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["training"]["changes"] == [
        {"step": 4, "name": "training.learning_rate", "before": 0.01, "after": 0.5}
    ]


def test_other_weights_of_the_backbone_do_not_resume(
    interrupted: Path, tmp_path: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny_bert / "model.safetensors"
    content = file.read_bytes()
    try:
        save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        assert main(["train", str(interrupted)]) == 1
        assert "backbone.weights (hash of the files): " in capfd.readouterr().err
    finally:
        file.write_bytes(content)
    assert main(["train", str(interrupted)]) == 0


def test_more_steps_and_fewer(interrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    allow = "output.allow_changes=[training.max_steps]"
    assert main(["train", str(interrupted), "training.max_steps=3", allow]) == 1
    assert "the checkpoint is of step 4, and the run has 3 now; give it more steps" in capfd.readouterr().err
    assert main(["train", str(interrupted), "training.max_steps=6", allow]) == 0
    assert len(events(tmp_path / "run", "loss")) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training.learnin_rate", "did you mean 'training.learning_rate'"),
        ("training.optimizer", "training.optimizer cannot change within a run"),
    ],
)
def test_names_that_nothing_has_are_refused(
    name: str, message: str, write_config: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(write_config()), f"output.allow_changes=[{name}]"]) == 2
    assert message in capfd.readouterr().err


def test_checkpoints_between_evaluations(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    save = Checkpoints.save

    def noting(self: Any, progress: Any, *given: Any) -> None:
        save(self, progress, *given)
        saved.append((progress.step, len(progress.evaluations)))

    monkeypatch.setattr(Checkpoints, "save", noting)
    training = {"learning_rate": 0.01, "max_steps": 11, "evaluate_every": 5, "batch_size": 16, "checkpoint_every": 3}
    assert main(["train", str(write_config(training=training))]) == 0
    assert saved == [(3, 0), (5, 1), (6, 1), (9, 1), (10, 2), (11, 3)]
