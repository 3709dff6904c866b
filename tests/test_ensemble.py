"""Several runs as one: the mean of their probabilities, taken by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import entity_rows, sentiment_rows, write_conll, write_jsonl

from peftkit.artifacts.ensemble import load_runs
from peftkit.artifacts.predict import evaluate_rows, predict_rows
from peftkit.artifacts.store import load_run as load_saved
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.collate import collate
from peftkit.data.files import read_file
from peftkit.errors import UsageError
from peftkit.experiment import train as train_run
from peftkit.prepare import encode_split

TRAINING = {"learning_rate": 0.02, "max_steps": 6, "batch_size": 8, "evaluate_every": 6}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Train:
    """The folder of a toy run, trained once for each seed and set of overrides."""
    root = tmp_path_factory.mktemp("ensemble")
    unique = list({row["text"]: row for row in sentiment_rows(80, 3)}.values())
    numbers = [row | {"label": float(len(row["text"]) % 7)} for row in unique]
    marks = [row | {"label": [row["label"], *(["long"] if len(row["text"]) > 30 else [])]} for row in unique]
    entities = list({" ".join(row["tokens"]): row for row in entity_rows(80, 3)}.values())
    files = {
        **{
            name: write_jsonl(root / f"{name}.jsonl", rows)
            for name, rows in (("single", unique), ("regression", numbers))
        },
        "multi": write_jsonl(root / "multi.jsonl", marks),
        "entities": write_conll(root / "entities.conll", entities),
    }
    tasks: dict[str, dict[str, Any]] = {
        "single": {"kind": "sequence_classification"},
        "mean": {"kind": "sequence_classification", "pooling": "mean"},
        "regression": {"kind": "sequence_classification", "problem": "regression"},
        "multi": {"kind": "sequence_classification", "problem": "multi_label"},
        "entities": {"kind": "token_classification"},
    }
    found: dict[str, Path] = {}

    def train(task: str, seed: int, method: str = "head", **more: Any) -> Path:
        key = f"{task}-{seed}-{method}-{'-'.join(map(str, more.values()))}"
        if key not in found:
            data = {"train": str(files.get(task, files["single"])), "test_fraction": 0.2}
            config = {
                "backbone": {"name": str(tiny_bert)},
                "task": tasks[task] | {"data": data, "max_length": 32} | more,
                "method": {"kind": method},
                "training": TRAINING | {"seed": seed},
                "output": {"folder": str(root / key)},
            }
            (root / "config.yaml").write_text(yaml.safe_dump(config))
            found[key] = train_run(load_run(root / "config.yaml")).folder
        return found[key]

    return train


def logits_by_hand(folder: Path, rows: Any) -> list[torch.Tensor]:
    """One example at a time, through the model alone."""
    saved = load_saved(folder)
    split = encode_split(saved.run, "rows", rows, saved.head, saved.tokenizer, supervised=False)
    with torch.no_grad():
        return [
            saved.run.task.logits(saved.model, collate([one], split.pad_id))[0].double()
            for one in split.encoded.examples
        ]


def test_classes_get_the_mean_of_the_probabilities(trained: Train) -> None:
    folders = [trained("single", 1), trained("single", 2), trained("single", 3, method="bitfit")]
    rows = load_saved(folders[0]).run.task.splits().held_out
    found = evaluate_rows(load_runs(folders), rows)
    each = [torch.stack(logits_by_hand(folder, rows)).softmax(-1) for folder in folders]
    expected = (each[0] + each[1] + each[2]) / 3
    for prediction, row in zip(found.predictions, expected, strict=True):
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
    labels = [("negative", "positive")[int(row.argmax())] for row in expected]
    right = sum(label == record["label"] for label, record in zip(labels, rows.records, strict=True))
    assert found.scores.values["accuracy"] == pytest.approx(right / len(rows))
    assert (each[0] - each[2]).abs().max() > 1e-3


def test_pooled_logits_are_averaged_after_pooling(trained: Train) -> None:
    folders = [trained("mean", 1), trained("mean", 2)]
    rows = load_saved(folders[0]).run.task.rows_from_text(["a good film", "the actor was very bad and sad"])
    each = [torch.stack(logits_by_hand(folder, rows)).softmax(-1) for folder in folders]
    for prediction, row in zip(predict_rows(load_runs(folders), rows), (each[0] + each[1]) / 2, strict=True):
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_marks_and_numbers(trained: Train) -> None:
    folders = [trained("multi", 1), trained("multi", 2)]
    rows = load_saved(folders[0]).run.task.rows_from_text(["a good film"])
    each = [torch.stack(logits_by_hand(folder, rows)).sigmoid() for folder in folders]
    (prediction,) = predict_rows(load_runs(folders), rows)
    assert list(prediction["probabilities"].values()) == pytest.approx(((each[0] + each[1]) / 2)[0].tolist(), abs=1e-5)

    folders = [trained("regression", 1), trained("regression", 2)]
    rows = load_saved(folders[0]).run.task.rows_from_text(["a good film"])
    numbers = [float(logits_by_hand(folder, rows)[0]) for folder in folders]
    (prediction,) = predict_rows(load_runs(folders), rows)
    assert prediction["value"] == pytest.approx(sum(numbers) / 2, abs=1e-5)


def test_tags_are_those_of_the_mean(trained: Train) -> None:
    folders = [trained("entities", 1), trained("entities", 2)]
    saved = load_saved(folders[0])
    rows = saved.run.task.splits().held_out
    found = evaluate_rows(load_runs(folders), rows)
    each = [[one.softmax(-1) for one in logits_by_hand(folder, rows)] for folder in folders]
    for index, prediction in enumerate(found.predictions):
        mean = ((each[0][index] + each[1][index]) / 2)[1:-1]  # a word is a token here, between [CLS] and [SEP]
        assert prediction["probabilities"] == pytest.approx(mean.max(-1).values.tolist(), abs=1e-5)
        assert prediction["tags"] == [saved.head.labels[int(best)] for best in mean.argmax(-1)]


def test_on_the_command_line(trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = trained("single", 1), trained("single", 2)
    probabilities = []
    for arguments in ([one], [two], [one, "--with", two]):
        assert main(["predict", *map(str, arguments), "a good film"]) == 0
        probabilities.append(json.loads(capsys.readouterr().out.splitlines()[-1])["probabilities"]["positive"])
    assert probabilities[2] == pytest.approx((probabilities[0] + probabilities[1]) / 2, abs=1e-6)
    data = write_jsonl(tmp_path / "rows.jsonl", sentiment_rows(20, 9))
    assert main(["evaluate", str(one), "--with", str(two), "--data", str(data), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["accuracy"] == evaluate_rows(load_runs([one, two]), read_file(data)).scores.value


def test_runs_that_do_not_go_together_are_refused(trained: Train) -> None:
    one = trained("single", 1)
    with pytest.raises(UsageError, match=r"different tasks \(task.max_length: 32 and 31\)"):
        load_runs([one, trained("single", 2, max_length=31)])
    with pytest.raises(UsageError, match=r"different tasks \(task\."):
        load_runs([one, trained("regression", 1)])
    with pytest.raises(UsageError, match=r"different labels \(negative, positive; positive, negative\)"):
        load_runs([one, trained("single", 2, labels=["positive", "negative"])])


def test_texts_have_no_mean(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(row["text"] for row in sentiment_rows(40, 5)) + "\n")
    config = {
        "backbone": {"name": str(tiny_llama)},
        "task": {"kind": "plain_text", "data": {"train": str(tmp_path / "train.txt")}, "max_length": 32},
        "method": {"kind": "lora", "rank": 2},
        "training": TRAINING | {"max_steps": 2},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    train_run(load_run(tmp_path / "config.yaml"))
    with pytest.raises(UsageError, match=r"predictions of task 'plain_text' have no mean: each model would write"):
        load_runs([tmp_path / "run", tmp_path / "run"])
