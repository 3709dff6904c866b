"""Sequences of tasks: the figures by hand, every strategy on a toy, and what must not go unnoticed."""

from __future__ import annotations

import json
import random
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CITIES, FILLERS, NEGATIVE, PEOPLE, POSITIVE, write_jsonl

from peftkit import shipped
from peftkit.artifacts.store import load_run
from peftkit.continual import carry, rows
from peftkit.continual.course import Course, Stage, begin
from peftkit.continual.figures import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from peftkit.continual.heads import digest, head_of, shared_part, worn
from peftkit.continual.outcome import figures_of, matrix_of
from peftkit.continual.rehearsal import TASK, Rehearsal, rehearse
from peftkit.continual.restored import restored
from peftkit.continual.sequence import load_sequence, sequence_id
from peftkit.data.collate import collate
from peftkit.errors import ArtifactError, ConfigError, PeftkitError, TrainingError, UsageError
from peftkit.methods.base import trained_parameters

RECIPE = shipped.folder() / "continual.py"
TASKS = {"sentiment": (POSITIVE, NEGATIVE), "city": (CITIES[:2], CITIES[2:]), "person": (PEOPLE[:1], PEOPLE[1:2])}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}

# --- figures ---------------------------------------------------------------------------------------

R: list[list[float | None]] = [[0.9, 0.5, None], [0.7, 0.8, 0.4], [0.6, 0.85, 0.7]]
"""Task 1 falls to 0.6 from 0.9; task 2 rises from 0.8 to 0.85."""


def test_figures_are_those_of_the_papers_formulas_by_hand() -> None:
    assert average_accuracy(R) == pytest.approx((0.6 + 0.85 + 0.7) / 3)
    assert learning_accuracy(R) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)
    assert forward_transfer(R, [0.5, 0.45, 0.5]) == pytest.approx(((0.5 - 0.45) + (0.4 - 0.5)) / 2)


def test_forgetting_is_from_the_best_and_not_from_the_first() -> None:
    risen: list[list[float | None]] = [[0.5, 0.1, None], [0.8, 0.6, 0.2], [0.7, 0.6, 0.9]]
    assert backward_transfer(risen) == pytest.approx(((0.7 - 0.5) + 0.0) / 2)
    assert forgetting(risen) == pytest.approx(((0.8 - 0.7) + 0.0) / 2)


def test_what_is_not_defined_is_not_told() -> None:
    alone: list[list[float | None]] = [[0.9, None], [0.9, 0.8]]
    assert forward_transfer(alone, [0.5, 0.5]) is None
    for figure in (backward_transfer, forgetting):
        with pytest.raises(ValueError, match="two tasks and more"):
            figure([[0.9]])
    with pytest.raises(ValueError, match=r"R\[1\]\[0\] is missing"):
        average_accuracy([[0.9, None], [None, 0.8]])


# --- a toy sequence --------------------------------------------------------------------------------


def toy_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences that hold a word for each task; every task has its own column of labels."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        words, row = chance.choices(FILLERS, k=chance.randint(0, 1)), {}
        for name, groups in TASKS.items():
            group = chance.randrange(2)
            row[name] = f"{name}-{group}"
            words.insert(chance.randint(0, len(words)), chance.choice(groups[group]))
        found.append(row | {"text": " ".join(words)})
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("toy")
    sizes = {"train": 160, "dev": 20, "test": 100}
    return {
        split: str(write_jsonl(folder / f"{split}.jsonl", toy_rows(size, seed)))
        for seed, (split, size) in enumerate(sizes.items())
    }


@pytest.fixture
def config(tmp_path: Path, tiny_bert: Path, toy: dict[str, str]) -> Callable[..., Path]:
    def write(
        strategy: str = "shared", names: tuple[str, ...] = ("sentiment", "city"), steps: int = 3, **sections: Any
    ) -> Path:
        tree = {
            "backbone": {"name": str(tiny_bert)},
            "strategy": strategy,
            "method": {"kind": "full"} if strategy == "full" else LORA,
            "tasks": [
                {
                    "name": name,
                    "task": {"kind": "sequence_classification", "data": toy, "label": name, "max_length": 32},
                }
                for name in names
            ],
            "training": {
                "learning_rate": 0.003 if strategy == "full" else 0.02,
                "max_steps": steps,
                "batch_size": 16,
                "evaluate_every": steps,
                "keep_best": False,
            },
            "output": {"folder": str(tmp_path / "sequence")},
        } | sections
        if strategy == "replay":
            tree.setdefault("replay", {"share": 0.5})
        file = tmp_path / "toy.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file

    return write


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The recipe, run as a script; returns its exit code."""

    def run(file: Path, *overrides: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(file), *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return int(ended.value.code or 0)

    return run


def result(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((file.parent / "sequence" / "result.json").read_text())
    return found


def stages(file: Path) -> list[Stage]:
    return list(Course(load_sequence(file)).stages())


@pytest.mark.parametrize("strategy", ["shared", "full"])
def test_what_is_trained_on_and_on_forgets(
    strategy: str, config: Callable[..., Path], recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(strategy, steps=40)
    assert recipe(file) == 0
    found = result(file)
    (seed,) = found["seeds"]
    matrix = seed["matrix"]
    assert min(matrix[0][0], matrix[1][1]) > 0.8  # each is learnt
    assert found["mean"]["forgetting"] == matrix[0][0] - matrix[1][0] > 0.1
    assert found["mean"]["backward_transfer"] == matrix[1][0] - matrix[0][0]
    assert found["mean"]["forward_transfer"] == matrix[0][1] - seed["untuned"][1]
    assert found["spread"]["forgetting"] is None
    printed = capsys.readouterr().out
    assert re.search(rf"\nafter city +{matrix[1][0]:.4f} +{matrix[1][1]:.4f}\n", printed)
    # the run of a task is a run as any other: what it answers is what was scored
    first, second = stages(file)
    assert load_run(second.folder).manifest["scores"]["after"]["accuracy"] == matrix[1][1]
    # the row's off-diagonal score by the slow path: the second run's shared part under the first one's saved head
    model, backbone = restored(second)
    head = head_of(*_parts(first))
    with worn(model, head):
        assert digest(head_of(model, backbone.head_modules)) != digest(head)  # it does not train
        assert _accuracy(first, model) == matrix[1][0]


def _parts(stage: Stage) -> tuple[Any, tuple[str, ...]]:
    model, backbone = restored(stage)
    return model, backbone.head_modules


def _accuracy(stage: Stage, model: Any) -> float:
    """By plain forward passes, one text at a time."""
    data, right = stage.prepare(), 0
    model.eval()
    for example in data.test.encoded.examples:
        batch = collate([example], data.test.pad_id)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int(logits.argmax()) == example["labels"]
    return right / len(data.test)


def test_an_adapter_for_each_task_forgets_nothing_and_seeds_have_a_spread(
    config: Callable[..., Path], recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config("per_task")
    assert recipe(file, "seeds=[1, 2]") == 0
    found = result(file)
    for seed in found["seeds"]:
        matrix = seed["matrix"]
        assert matrix[1][0] == matrix[0][0] and matrix[0][1] is None
    assert found["mean"]["forgetting"] == found["spread"]["forgetting"] == found["mean"]["backward_transfer"] == 0
    assert found["mean"]["forward_transfer"] is None
    ones = [seed["matrix"][1][1] for seed in found["seeds"]]
    assert f"{sum(ones) / 2:.4f} ± {abs(ones[0] - ones[1]) / 2**0.5:.4f}" in capsys.readouterr().out
    # a score of an earlier task that changed although its adapter is its own
    first, second = stages(file)[:2]
    row = first.row()
    assert row is not None
    first.keep_row(row.model_copy(update={"scores": (row.scores[0] - 0.01,)}))
    second.folder.with_name("2-city.row.json").unlink()
    with pytest.raises(TrainingError, match=r"task 'sentiment' scored .* when it was learnt and .* after task 'city'"):
        rows.add_row(second)


def test_replay_mixes_rows_in_and_leaves_a_run_as_any_other(
    config: Callable[..., Path], recipe: Callable[..., int]
) -> None:
    file = config("replay", replay={"share": 0.3})
    assert recipe(file) == 0
    second = stages(file)[1]
    manifest = json.loads((second.folder / "manifest.json").read_text())
    assert "replay: beside 160 rows of city, 69 from the 160 of sentiment" in manifest["notes"]
    # the run is a classifier of its own task for everybody else
    assert {one["label"] for one in _predictions(second)} == {"city-0", "city-1"}


def test_replay_forgets_less_and_learns_the_new_task_too(
    config: Callable[..., Path], recipe: Callable[..., int]
) -> None:
    matrices = {}
    for strategy in ("shared", "replay"):
        file = config(strategy, steps=80)
        assert recipe(file, "training.learning_rate=0.005", f"output.folder={file.parent / strategy}") == 0
        matrices[strategy] = json.loads((file.parent / strategy / "result.json").read_text())["seeds"][0]["matrix"]
    lost = {strategy: matrix[0][0] - matrix[1][0] for strategy, matrix in matrices.items()}
    assert lost["replay"] < lost["shared"] - 0.05
    assert matrices["replay"][1][1] > 0.7


def _predictions(stage: Stage) -> list[dict[str, Any]]:
    lines = (stage.folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_the_loss_of_a_mixed_batch_is_that_of_each_task_under_its_own_head(
    config: Callable[..., Path], recipe: Callable[..., int]
) -> None:
    file = config("replay", ("sentiment", "city", "person"), replay={"rows_per_task": 5})
    assert recipe(file) == 0
    *earlier, last = stages(file)
    run, mixed = rehearse(last, last.prepare())
    assert isinstance(run.task, Rehearsal)
    own = len(last.prepare().train)
    assert [one[TASK] for one in mixed.train.encoded.examples] == [0] * own + [1] * 5 + [2] * 5
    chosen = [0, own, 3, own + 7, own + 2]
    model, _ = restored(last)
    model.eval()
    batch = collate([mixed.train.encoded.examples[index] for index in chosen], mixed.train.pad_id)
    weights = torch.tensor(mixed.class_weights)
    loss = run.task.summed_loss(model, batch, weights)
    expected = torch.zeros(())
    for index in chosen:
        example = dict(mixed.train.encoded.examples[index])
        number = example.pop(TASK)
        stage = last if number == 0 else earlier[number - 1]
        head = head_of(*_parts(stage))
        with worn(model, head):
            one = collate([example], mixed.train.pad_id)
            logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
            expected = expected - logits.log_softmax(-1)[0, example["labels"]]
        # the row of the example is the one it was made from
        assert mixed.train.rows.records[index][stage.name] == stage.prepare().head.labels[example["labels"]]
    torch.testing.assert_close(loss, expected)
    assert run.task.example_weight(mixed.train.encoded.examples[own], mixed.class_weights) == 1.0
    loss.backward()
    run.task.check_heads()
    next(iter(run.task._remembered[0].head.values())).add_(1e-6)
    with pytest.raises(TrainingError, match="the head of task 'sentiment' changed while a later task was trained"):
        run.task.check_heads()
    gradients = {name: p.grad for name, p in trained_parameters(model).items()}
    assert set(shared_part(model, ("classifier",))) < set(gradients) and None not in gradients.values()


# --- going on --------------------------------------------------------------------------------------


def test_a_sequence_that_was_stopped_goes_on_with_the_next_task_and_ends_alike(
    config: Callable[..., Path],
    recipe: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = config("shared")
    assert recipe(file) == 0
    whole = result(file)
    assert recipe(file) == 0  # nothing is left to do
    assert "training" not in capsys.readouterr().out.split("written to")[-2]
    shutil.rmtree(tmp_path / "sequence")

    def stopped(stage: Stage, *rest: Any) -> Any:
        if stage.number == 1:
            raise KeyboardInterrupt
        return original(stage, *rest)

    original = carry.carry_on
    monkeypatch.setattr(carry, "carry_on", stopped)
    assert recipe(file) == 130
    assert not (tmp_path / "sequence" / "result.json").exists()
    monkeypatch.setattr(carry, "carry_on", original)
    first = stages(file)[0]
    (first.folder.with_name("1-sentiment.row.json")).unlink()  # killed between training and scoring
    manifest = (first.folder / "manifest.json").stat().st_mtime_ns
    assert recipe(file) == 0
    assert (first.folder / "manifest.json").stat().st_mtime_ns == manifest
    again = result(file)
    assert [one["matrix"] for one in again["seeds"]] == [one["matrix"] for one in whole["seeds"]]
    # more seeds go on in the same folder; other settings do not
    assert recipe(file, "method.rank=2") == 2
    assert "method.rank: 4 → 2; name another output.folder" in capsys.readouterr().err


def test_weights_that_are_not_those_that_a_training_ended_with_are_told(
    config: Callable[..., Path], recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config("shared")
    assert recipe(file) == 0
    first, second = stages(file)
    seal = first.seal()
    for part, message in (("shared", "the shared part"), ("head", "the head")):
        first.keep_seal(seal.model_copy(update={part: "0" * 64}))
        with pytest.raises(ArtifactError, match=f"{message} is not what the training of task 'sentiment' ended with"):
            restored(first)
    # the next task begins with something else than the one before ended with
    first.keep_seal(seal.model_copy(update={"shared": "0" * 64}))
    shutil.rmtree(second.folder)
    assert recipe(file) == 1
    assert "what task 'city' begins with is not what task 'sentiment' ended with" in capsys.readouterr().err
    first.keep_seal(seal)
    assert recipe(file) == 0
    # an earlier task that was learnt anew, under a later one that went on from its former self
    shutil.rmtree(first.folder)
    assert recipe(file, "seeds=[1]") == 1
    assert "went on from another run of task 'sentiment'" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "an unknown strategy": (["strategy=sharde"], "strategy: 'sharde' is not a choice; did you mean 'shared'"),
    "a share of everything": (["strategy=replay", "replay={share: 1}"], "replay.share: should be less than 1, got 1"),
    "a share of nothing": (["strategy=replay", "replay={share: 0}"], "replay.share: should be greater than 0, got 0"),
    "no size of replay": (["strategy=replay", "replay={}"], "replay: give one of share"),
    "no replay": (["strategy=replay"], "replay: is missing, and strategy 'replay' needs it"),
    "replay for nothing": (["replay={share: 0.2}"], r"replay: does nothing with strategy 'shared'; leave it out"),
    "nothing that trains": (["method={kind: prompting}"], "method 'prompting' trains nothing"),
    "a head alone": (["method={kind: head}"], "trains heads alone, and each task has its own"),
    "spent ranks": (["method={kind: adalora}"], "its rank budget is spent when a task ends"),
    "a moved base": (["method.initialization=pissa"], "initialization pissa moves a part of the backbone"),
    "a lost network": (["method={kind: p_tuning}"], "method 'p_tuning' cannot be carried from task to task"),
    "a lost MLP": (["method={kind: prefix, reparametrization_size: 4}"], "the MLP of reparametrization_size is left"),
    "full by another name": (["method={kind: full}"], "strategy: method 'full' has no adapter to share"),
    "an adapter as full": (["strategy=full"], "strategy 'full' is for method 'full', not 'lora'"),
    "a start of one's own": (["method.start_from=x"], "method.start_from: a sequence sets this by itself"),
    "a seed beside seeds": (["training.seed=3"], "training.seed: a sequence has a list of seeds"),
    "one seed twice": (["seeds=[1, 1]"], "seeds: one seed is there twice"),
    "two losses": (
        ["strategy=replay", "replay={share: 0.1}", "training.r_drop=0.5"],
        "training.r_drop: not with replay",
    ),
    "an impossible run": (
        ["strategy=full", "method={kind: full}", "backbone.dtype=bfloat16"],
        "tasks.0: method 'full' trains weights of the backbone itself; in bfloat16 it loses",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(case: str, config: Callable[..., Path]) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        load_sequence(config("shared"), overrides)
    assert message in str(refused.value)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(("command line: ", str(config("shared"))))


def test_tasks_that_make_no_sequence_are_refused_with_their_line(config: Callable[..., Path], toy: Any) -> None:
    def told(names: tuple[str, ...], change: Callable[[list[Any]], None] = lambda tasks: None) -> list[str]:
        file = config("shared", names)
        tree = yaml.safe_load(file.read_text())
        change(tree["tasks"])
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        with pytest.raises(ConfigError) as refused:
            load_sequence(file)
        where = [problem.removeprefix(f"{file}:").partition(": ") for problem in refused.value.problems]
        lines = file.read_text().splitlines()
        return [f"{lines[int(line) - 1].strip()} | {problem}" for line, _, problem in where]

    assert told(("sentiment",)) == ["tasks: | tasks: a sequence has two tasks or more, and here is 1"]
    again = "tasks.1.name: another task is called 'city' too; give it a name of its own"
    assert told(("city", "city")) == [f"- name: city | {again}"]
    kind = "tasks.1.task: a sequence is of classifications of texts, and this is 'plain_text'"
    assert told(("city", "person"), lambda tasks: tasks[1].update(task={"kind": "plain_text", "data": toy})) == [
        f"task: | {kind}"
    ]
    (missing,) = told(("city", "person"), lambda tasks: tasks[0]["task"].update(data={"train": "nowhere.jsonl"}))
    assert missing.startswith("data: | tasks.0.task.data: ") and "nowhere.jsonl" in missing
    pooling = "tasks.1.task.pooling: 'mean', and the first task's is 'cls'; all need the same"
    assert told(("city", "person"), lambda tasks: tasks[1]["task"].update(pooling="mean")) == [
        f"pooling: mean | {pooling}"
    ]


def test_a_folder_of_somebody_else_is_left_alone(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sequence").mkdir()
    (tmp_path / "sequence" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files and no sequence.yaml"):
        begin(load_sequence(config()))
    assert [one.name for one in (tmp_path / "sequence").iterdir()] == ["thesis.txt"]


def test_several_processes_and_more_rows_than_there_are_are_refused(
    config: Callable[..., Path],
    recipe: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = config("replay", replay={"rows_per_task": 161})
    assert recipe(file) == 2
    assert "replay.rows_per_task is 161, and task 'sentiment' has 160 training rows" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recipe(file) == 2
    assert "a sequence of tasks is learnt in one process" in capsys.readouterr().err


def test_the_shipped_sequences_can_be_read_and_named(monkeypatch: pytest.MonkeyPatch, real_data: Path) -> None:
    files = list(shipped.sequences())
    assert files
    for file in files:
        plain = load_sequence(file)
        assert plain.output.folder == f"runs/{file.stem}-{sequence_id(plain)[:8]}"
        other = load_sequence(file, ["seeds=[7]", "output.folder=elsewhere"])
        assert sequence_id(other) == sequence_id(plain)
        for line in file.read_text().splitlines():
            if line.startswith("#   python") and "strategy=" in line:
                load_sequence(file, shlex.split(line.partition("… ")[2]))


def test_a_matrix_has_what_is_known_and_nothing_else(config: Callable[..., Path]) -> None:
    from peftkit.continual.course import Row

    known = {"seed": 1, "manifests": (), "headline": "accuracy", "test_rows": 9, "trainable_parameters": 1}
    known |= {"steps": 1, "seconds": 1.0}
    made = [
        Row(task=str(index), scores=tuple([0.5 + index / 10] * (index + 1)), untuned=0.3, before=before, **known)
        for index, before in enumerate([None, 0.4, 0.2])
    ]
    matrix = matrix_of(made)
    assert matrix == [[0.5, 0.4, None], [0.6, 0.6, 0.2], [0.7, 0.7, 0.7]]
    assert figures_of(matrix, [0.3] * 3)["forward_transfer"] == pytest.approx(((0.4 - 0.3) + (0.2 - 0.3)) / 2)
    assert issubclass(ConfigError, PeftkitError)
