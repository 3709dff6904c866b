"""Prompting: what is shown, that it is the same every time and never scored, and that nothing is trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import sentiment_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.artifacts.store import load_run as load_saved
from peftkit.cli import main
from peftkit.config import Run, load_run
from peftkit.data.sources import Splits, splits_from
from peftkit.demonstrations import choose, with_demonstrations
from peftkit.errors import ConfigError, DataError, UsageError
from peftkit.prepare import prepare

TASK = {"kind": "label_words", "template": "{text} is", "words": {"positive": " good", "negative": " bad"}}
COMPLETION = {"kind": "completion", "prompt_template": "{text} is", "completion_template": " {label}"}


@pytest.fixture(scope="module")
def splits() -> Splits:
    rows = {seed: sentiment_rows(count, seed) for seed, count in enumerate((60, 10, 20))}
    return splits_from(rows[0] + rows[2][:8], dev=rows[1], test=rows[2])  # some rows of test are in train too


def run_of(backbone: Path, task: dict[str, Any] = TASK, **method: Any) -> Run:
    settings = {"method": {"kind": "prompting"} | method, "training": {"learning_rate": None}}
    return Run.model_validate(
        settings | {"backbone": {"name": str(backbone)}, "task": task | {"data": None, "max_length": 60}}
    )


def shown(run: Run) -> list[dict[str, Any]]:
    return list(run.task.demonstrations)  # type: ignore[union-attr]


@pytest.mark.parametrize("task", [TASK, COMPLETION], ids=lambda task: str(task["kind"]))
def test_demonstrations_are_the_same_for_a_seed_and_never_scored(
    task: dict[str, Any], tiny_llama: Path, splits: Splits
) -> None:
    assert splits.test is not None
    scored = [record for rows in (splits.dev, splits.test) for record in rows.records]
    chosen = {seed: shown(with_demonstrations(run_of(tiny_llama, task, shots=6, seed=seed), splits)) for seed in (0, 1)}
    again = shown(with_demonstrations(run_of(tiny_llama, task, shots=6), splits))
    assert chosen[0] == again != chosen[1]
    for records in chosen.values():
        assert len(records) == 6
        assert all(record in splits.train.records and record not in scored for record in records)
    everything = [record for record in splits.train.records if record not in scored]
    most = with_demonstrations(run_of(tiny_llama, task, shots=len(everything)), splits)
    assert sorted(map(str, shown(most))) == sorted(map(str, everything))
    with pytest.raises(DataError, match=rf"shots is {len(everything) + 1}, and train has {len(everything)} rows that"):
        with_demonstrations(run_of(tiny_llama, task, shots=len(everything) + 1), splits)


@pytest.mark.parametrize(("count", "expected"), [(3, [1, 1, 1]), (7, [2, 2, 3]), (9, [2, 3, 4]), (11, [2, 4, 5])])
def test_classes_are_shown_equally_often(count: int, expected: list[int]) -> None:
    classes = ["a"] * 5 + ["b"] * 20 + ["c"] * 2
    if count == 9:
        classes = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    if count == 11:
        classes = ["a"] * 4 + ["b"] * 20 + ["c"] * 2
    for seed in range(5):
        found = choose(classes, count, seed)
        assert len(set(found)) == count
        assert sorted(Counter(classes[index] for index in found).values()) == expected
    orders = {tuple(classes[index] for index in choose(classes, count, seed)) for seed in range(20)}
    assert len(orders) > 1


def test_the_tokens_of_a_prompt_are_those_of_its_text(tiny_llama: Path, splits: Splits) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    words = {"positive": "good", "negative": "bad"}
    run = with_demonstrations(run_of(tiny_llama, shots=2, seed=3), splits)
    data = prepare(run, splits)
    front = "".join(f"{one['text']} is {words[one['label']]}\n\n" for one in shown(run))
    for example, record in zip(data.test.encoded.examples, data.test.rows.records, strict=True):
        assert example["input_ids"] == tokenizer(f"{front}{record['text']} is").input_ids
    run = with_demonstrations(run_of(tiny_llama, COMPLETION | {"separator": " . "}, shots=2, seed=3), splits)
    data = prepare(run, splits)
    front = "".join(f"{one['text']} is {one['label']} . " for one in shown(run))
    for example, record in zip(data.test.encoded.examples, data.test.rows.records, strict=True):
        ids = tokenizer(f"{front}{record['text']} is {record['label']}").input_ids
        assert example["input_ids"] == [*ids, tokenizer.eos_token_id]
        assert [label for label in example["labels"] if label != -100] == [ids[-1], tokenizer.eos_token_id]


def test_prompts_are_not_made_without_their_demonstrations(tiny_llama: Path, splits: Splits) -> None:
    with pytest.raises(UsageError, match=r"2 demonstrations are not chosen yet: run = with_demonstrations"):
        prepare(run_of(tiny_llama, shots=2), splits)
    given = [{"text": "the film", "label": "positive"}] * 2
    assert shown(with_demonstrations(run_of(tiny_llama, TASK | {"demonstrations": given}, shots=2), splits)) == given
    with pytest.raises(ValueError, match=r"method.shots is 3 and task.demonstrations has 2; leave one out"):
        run_of(tiny_llama, TASK | {"demonstrations": given}, shots=3)


@pytest.fixture
def config(tiny_llama: Path, toy_data: Path, tmp_path: Path) -> Path:
    files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    settings = {
        "backbone": {"name": str(tiny_llama)},
        "task": TASK | {"data": files, "max_length": 60},
        "method": {"kind": "prompting", "shots": 2},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return tmp_path / "config.yaml"


def test_a_run_is_scored_saved_and_read_back(
    config: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", str(config)]) == 0
    assert "training  none;" in capsys.readouterr().out
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores) == ["majority", "after"]
    assert not list(folder.rglob("*.safetensors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["training"]["steps"], manifest["saved_parameters"]) == (0, 0)
    saved = load_saved(folder)
    assert len(shown(saved.run)) == 2
    untouched = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in saved.model.state_dict().items())
    assert main(["evaluate", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(scores["after"]["values"])
    assert main(["predict", str(folder), "the good film"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("positive", "negative")
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 1
    assert "prompting trains nothing, so there is nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["train", str(config)]) == 2  # the same demonstrations are the same run
    assert "holds this run, finished (accuracy" in capsys.readouterr().err


def test_the_recipe_does_what_the_verb_does(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import prompting

    assert main(["train", str(config)]) == 0
    arguments = ["prompting.py", "--config", str(config), f"output.folder={tmp_path / 'recipe'}"]
    monkeypatch.setattr("sys.argv", arguments)
    prompting.main()
    for file in ("scores.json", "predictions.jsonl"):
        assert (tmp_path / "recipe" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_a_learning_rate_is_needed_where_something_trains(config: Path) -> None:
    assert load_run(config).training.learning_rate is None
    assert load_run(config, ["training.evaluation_batch_size=3"]).training.evaluation_batch_size == 3
    with pytest.raises(ConfigError, match="training: missing"):
        load_run(config, ["method={kind: lora}"])
    with pytest.raises(ConfigError, match=r"training.learning_rate: missing"):
        load_run(config, ["method={kind: lora}", "training.epochs=1"])
    with pytest.raises(ConfigError, match=r"method 'lora' trains, so training.learning_rate must be a number"):
        load_run(config, ["method={kind: lora}", "training.learning_rate=null"])


def test_a_task_with_a_head_cannot_be_prompted(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"task 'sequence_classification' has a head that would stay random"):
        load_run(config, ["task={kind: sequence_classification, data: {train: a.tsv}}"])
