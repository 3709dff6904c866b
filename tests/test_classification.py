"""Sequence classification beyond one class a row: labels in any number and numbers, against scikit-learn, scipy, torch,
transformers' own pipeline, and formulas in float64."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from conftest import CITIES, FILLERS, NEGATIVE, POSITIVE, sentiment_rows, write_jsonl
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from peftkit.artifacts.predict import evaluate_rows, predict_rows
from peftkit.artifacts.store import load_run
from peftkit.cli import main
from peftkit.data.collate import collate
from peftkit.data.files import Rows, read_file
from peftkit.data.sources import DataSettings, splits_from
from peftkit.errors import DataError
from peftkit.metrics.classes import ClassificationReport, MultiLabelReport
from peftkit.metrics.regression import RegressionReport
from peftkit.tasks import SequenceClassification
from peftkit.tasks.losses import BinaryCrossEntropy, Focal, SquaredError, Weighted

ABC = ("a", "b", "c")


def task_of(problem: str = "single_label", **settings: Any) -> SequenceClassification:
    return SequenceClassification(data=DataSettings(train="train.jsonl"), problem=problem, **settings)


def rows_with(*labels: Any, **columns: Sequence[Any]) -> Rows:
    count = len(labels) or len(next(iter(columns.values())))
    records: list[dict[str, Any]] = [{"text": "good film"} for _ in range(count)]
    for name, values in {**({"label": labels} if labels else {}), **columns}.items():
        for record, value in zip(records, values, strict=True):
            record[name] = value
    return Rows("train.jsonl", records, range(1, count + 1))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


class TestReadingLabels:
    def test_lists(self, tokenizer: Any) -> None:
        rows, task = rows_with(["b", "a"], [], ["c"], ["a", "a"]), task_of("multi_label")
        head = task.head(rows)
        assert head.labels == ABC
        assert head.problem_type == "multi_label_classification"
        assert task.references(rows, ABC) == [["a", "b"], [], ["c"], ["a"]]
        assert [e["labels"] for e in task.encode(rows, tokenizer, ABC).examples] == [
            [1, 1, 0],
            [0, 0, 0],
            [0, 0, 1],
            [1, 0, 0],
        ]

    def test_text_with_separators_from_csv(self, tmp_path: Path) -> None:
        file = tmp_path / "train.csv"
        file.write_text('text,label\ngood,"b; a"\nbad,\nfine,c\n')
        task = task_of("multi_label", label_separator=";")
        rows = read_file(file)
        assert task.head(rows).labels == ABC
        assert task.references(rows, ABC) == [["a", "b"], [], ["c"]]

    def test_columns(self) -> None:
        rows = rows_with(toxic=[0, "1", True, 1.0], rude=["0", "false", 1, 0])
        task = task_of("multi_label", label_columns=("toxic", "rude"))
        assert task.head(rows).labels == ("toxic", "rude")
        assert task.references(rows, ("toxic", "rude")) == [[], ["toxic"], ["toxic", "rude"], ["toxic"]]

    def test_numbers_are_positions_of_names(self) -> None:
        task = task_of("multi_label", labels=("x", "y", "z"))
        assert task.references(rows_with([2, 0], ["1", "z"]), ("x", "y", "z")) == [["x", "z"], ["y", "z"]]

    def test_class_names_of_a_data_set(self) -> None:
        names = datasets.ClassLabel(names=["z", "a", "unused"])
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Sequence(names)})
        table = datasets.Dataset.from_dict({"text": ["good"] * 3, "label": [[1, 0], [], [0]]}, features=features)
        splits, task = splits_from(table, table), task_of("multi_label")
        assert task.head(splits.train).labels == ("z", "a", "unused")
        assert task.references(splits.dev, ("z", "a", "unused")) == [["z", "a"], [], ["z"]]

    @pytest.mark.parametrize("value", [None, "a", 3, ["a", None], ["a", ""]])
    def test_what_is_no_list(self, value: Any) -> None:
        rows = rows_with(["a", "b"], value)
        with pytest.raises(DataError, match=r"train\.jsonl:2: no list of labels in 'label'; write a list, or set"):
            task_of("multi_label").head(rows)

    def test_an_empty_value_needs_a_separator_to_mean_none(self) -> None:
        with pytest.raises(DataError, match=r"train\.jsonl:1: no list of labels in 'label'; write a list, \[\]"):
            task_of("multi_label", label_separator=",").references(rows_with(None), ABC)

    @pytest.mark.parametrize("value", [2, "yes", None, 0.5, ""])
    def test_marks_other_than_0_and_1(self, value: Any) -> None:
        rows = rows_with(toxic=[0, value], rude=[1, 1])
        with pytest.raises(DataError) as caught:
            task_of("multi_label", label_columns=("toxic", "rude")).references(rows, ("toxic", "rude"))
        assert f"train.jsonl:2: 'toxic' is {value!r}; each of label_columns must be 0 or 1" in str(caught.value)

    def test_an_unknown_label(self) -> None:
        rows = rows_with(["pos"], ["neg", "poss"])
        with pytest.raises(DataError, match=r":2: label 'poss' never occurs in training; did you mean 'pos'\?"):
            task_of("multi_label").references(rows, ("neg", "pos"))

    def test_one_label_in_all(self) -> None:
        with pytest.raises(DataError, match="has 1 label in all; multi-label classification needs two"):
            task_of("multi_label").head(rows_with(["a"], []))

    def test_dev_is_not_stratified_by_lists_or_numbers(self) -> None:
        assert task_of().label_column() == "label"
        assert task_of("multi_label").label_column() is None
        assert task_of("regression").label_column() is None


class TestReadingNumbers:
    def test_numbers_and_their_text(self, tokenizer: Any) -> None:
        rows, task = rows_with(5, "4.750", " 0 ", -1.5, "1e-2"), task_of("regression", label="label")
        head = task.head(rows)
        assert (head.labels, head.problem_type) == (("label",), "regression")
        assert [e["labels"] for e in task.encode(rows, tokenizer, head.labels).examples] == [5, 4.75, 0, -1.5, 0.01]
        batch = collate(task.encode(rows, tokenizer, head.labels).examples, 0)
        assert batch["labels"].dtype == torch.float32

    @pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "", None, "high", float("nan"), True, "1_0", "4,5"])
    def test_what_is_no_number(self, value: Any) -> None:
        with pytest.raises(DataError) as caught:
            task_of("regression").head(rows_with(1, value, 2))
        assert f"train.jsonl:2: 'label' is {value!r}, no finite number" in str(caught.value)

    def test_a_column_of_classes(self) -> None:
        message = r"train\.jsonl: problem is regression, but 'label' holds classes such as 'pos'; use problem: single"
        with pytest.raises(DataError, match=message):
            task_of("regression").head(rows_with("pos", "neg"))

    def test_a_column_of_measurements_is_not_one_of_classes(self) -> None:
        similarities = [f"{value / 20:.3f}" for value in range(100)]
        with pytest.raises(
            DataError, match=r"'label' holds 100 different numbers such as 0\.050, which look like no cl"
        ):
            task_of().head(rows_with(*similarities))
        with pytest.raises(
            DataError, match=r"'label' holds 60 different numbers such as 59, .* set problem: regression"
        ):
            task_of().head(rows_with(*range(60), *range(30)))
        assert len(task_of().head(rows_with(*range(60), *range(60))).labels) == 60  # as often as classes are
        assert len(task_of().head(rows_with(*(f"intent {i}" for i in range(60)))).labels) == 60
        names = tuple(similarities)
        assert task_of(labels=names).head(rows_with(*similarities)).labels == names


class TestLosses:
    def marks(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return 3 * torch.randn(20, 4, generator=generator), torch.randint(0, 2, (20, 4), generator=generator)

    @pytest.mark.parametrize("given", [None, "balanced", (0.5, 2.0, 1.0, 7.0)])
    def test_binary_cross_entropy_in_float64(self, given: Any) -> None:
        logits, marks = self.marks()
        task = task_of("multi_label", loss=BinaryCrossEntropy(positive_weights=given))
        weights = task.class_weights(_encoded(marks.tolist()), tuple("abcd"))
        balanced = [(20 - column.sum().item()) / column.sum().item() for column in marks.T]
        expected_weights = list(given) if isinstance(given, tuple) else balanced if given else [1.0] * 4
        assert weights == pytest.approx(expected_weights)
        total = 0.0
        for row, right in zip(logits.double().tolist(), marks.tolist(), strict=True):
            terms = []
            for logit, mark, weight in zip(row, right, weights, strict=True):
                p = 1 / (1 + math.exp(-logit))
                terms.append(-weight * math.log(p) if mark else -math.log(1 - p))
            total += sum(terms) / 4
        found = task.loss_of(logits, marks, torch.tensor(weights))
        assert float(found) == pytest.approx(total, rel=1e-5)
        assert torch.allclose(found / 20, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, marks.float()))

    def test_a_label_on_every_row_or_none_has_weight_1(self) -> None:
        assert BinaryCrossEntropy(positive_weights="balanced").label_weights([4, 0, 1], 4) == [1.0, 1.0, 3.0]

    def test_a_wrong_number_of_weights(self) -> None:
        with pytest.raises(DataError, match=r"task\.loss\.positive_weights has 2 weights for 3 labels"):
            BinaryCrossEntropy(positive_weights=(1.0, 2.0)).label_weights([1, 1, 1], 3)

    def test_squared_error_is_torchs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, numbers = torch.randn(30, 1, generator=generator), 5 * torch.rand(30, generator=generator)
        found = task_of("regression").loss_of(logits, numbers, torch.ones(1))
        assert torch.allclose(found / 30, nn.MSELoss()(logits[:, 0], numbers))

    def test_half_precision_logits_are_scored_in_float32(self) -> None:
        logits, marks = self.marks()
        half = logits.bfloat16()
        found = task_of("multi_label").loss_of(half, marks, torch.ones(4))
        assert found.dtype == torch.float32
        assert torch.allclose(found / 20, nn.BCEWithLogitsLoss()(half.float(), marks.float()))

    @pytest.mark.parametrize("problem", ["multi_label", "regression"])
    def test_the_loss_is_transformers_and_the_same_for_every_split_of_a_batch(
        self, problem: str, tiny_bert: Path, tokenizer: Any
    ) -> None:
        torch.manual_seed(0)
        labels = ABC if problem == "multi_label" else ("label",)
        task, rows = task_of(problem), ROWS[problem](7, 0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=len(labels)).eval()
        model.config.problem_type = task.head(rows_of(rows)).problem_type
        encoded = task.encode(rows_of(rows), tokenizer, task.head(rows_of(rows)).labels)
        weights = torch.tensor(task.class_weights(encoded, labels))
        whole = collate(encoded.examples, 0)
        given = whole | {"labels": whole["labels"].float()}
        with torch.no_grad():
            expected = model(**given).loss
            parts = [task.summed_loss(model, collate(encoded.examples[i : i + 2], 0), weights) for i in range(0, 7, 2)]
            together = task.summed_loss(model, whole, weights)
        total = sum(task.example_weight(example, weights.tolist()) for example in encoded.examples)
        assert float(together) / total == pytest.approx(float(expected), rel=1e-5)
        assert float(sum(parts)) == pytest.approx(float(together), rel=1e-5)

    def test_defaults_and_names(self) -> None:
        assert task_of("multi_label").loss == BinaryCrossEntropy()
        assert task_of("regression").loss == SquaredError()
        assert task_of("multi_label", loss={"kind": "binary_cross_entropy", "positive_weights": [1.0, 2.0]}).loss == (
            BinaryCrossEntropy(positive_weights=(1.0, 2.0))
        )
        for problem in ("single_label", "multi_label", "regression"):
            task = task_of(problem)
            assert SequenceClassification.model_validate_json(task.model_dump_json(), strict=True) == task


class TestSettings:
    @pytest.mark.parametrize(
        ("problem", "loss"),
        [
            ("multi_label", Weighted()),
            ("multi_label", "label_smoothed"),
            ("multi_label", "cross_entropy"),
            ("regression", Focal()),
            ("regression", "binary_cross_entropy"),
            ("single_label", "squared_error"),
            ("single_label", "binary_cross_entropy"),
        ],
    )
    def test_losses_that_do_not_fit(self, problem: str, loss: Any) -> None:
        kind = loss if isinstance(loss, str) else loss.kind
        with pytest.raises(ValueError, match=f"loss '{kind}' does not fit problem '{problem}'; it can be: "):
            task_of(problem, loss=loss)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 0.4}, "threshold: only of problem 'multi_label', not 'single_label'"),
            ({"problem": "regression", "label_columns": ("a", "b")}, "label_columns: only of problem 'multi_label'"),
            ({"problem": "regression", "labels": ("a", "b")}, "labels are of classes, and a regression has none"),
            ({"problem": "multi_label", "label_columns": ("a", "a")}, "label_columns must be two or more different"),
            (
                {"problem": "multi_label", "label_columns": ("a", "b"), "label_separator": ";"},
                "label_columns name the labels by themselves; leave label_separator out",
            ),
        ],
    )
    def test_settings_that_do_not_belong_together(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            task_of(**settings)

    def test_told_with_file_and_line(self, configured: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        file = configured("regression", loss="focal")
        assert main(["validate", str(file)]) == 2
        error = capsys.readouterr().err
        assert "loss 'focal' does not fit problem 'regression'; it can be: squared_error" in error
        assert file.name in error


class TestScores:
    @pytest.mark.parametrize("seed", range(4))
    def test_labels_are_scored_as_by_sklearn(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        names = ("a", "b", "c", "never")
        right, found = draw.random((2, 40, 4)) < np.array([0.6, 0.3, 0.1, 0.0])
        found[:, 3] = draw.random(40) < 0.1
        task = task_of("multi_label")
        rows = rows_with(*([name for name, mark in zip(names, row, strict=True) if mark] for row in right))
        predictions = [{"labels": [n for n, mark in zip(names, row, strict=True) if mark]} for row in found]
        scores = task.score(predictions, rows, names)
        assert scores.headline == "micro_f1"
        for average in ("micro", "macro", "weighted"):
            expected = sklearn.metrics.f1_score(right, found, average=average, zero_division=0)
            assert scores.values[f"{average}_f1"] == pytest.approx(expected, abs=1e-12)
        assert scores.values["subset_accuracy"] == pytest.approx(np.mean((right == found).all(1)), abs=1e-12)
        report = sklearn.metrics.classification_report(
            right, found, target_names=names, output_dict=True, zero_division=0
        )
        for row in scores.per_class:
            one = report[row["name"]]
            expected_row = [one["precision"], one["recall"], one["f1-score"], one["support"]]
            assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(expected_row)

    def test_labels_by_hand(self) -> None:
        found: Any = MultiLabelReport(labels=["x", "y"]).compute(
            predictions=[[1, 0], [1, 1], [0, 0]], references=[[1, 0], [0, 1], [0, 0]]
        )
        assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
        assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
        assert found["subset_accuracy"] == pytest.approx(2 / 3)

    def test_no_label_anywhere(self) -> None:
        found: Any = MultiLabelReport(labels=["x", "y"]).compute(predictions=[[0, 0]], references=[[0, 0]])
        assert (found["micro_f1"], found["subset_accuracy"]) == (0.0, 1.0)

    @pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
    def test_a_label_is_given_from_the_threshold_on(self, threshold: float) -> None:
        logits = torch.linspace(-4, 4, 41).reshape(-1, 1).repeat(1, 2)
        task = task_of("multi_label", threshold=threshold)
        for row, one in zip(logits, task.meaning.predictions(logits, ("x", "y")), strict=True):
            p = 1 / (1 + math.exp(-float(row[0])))
            assert one["probabilities"] == pytest.approx({"x": p, "y": p}, abs=1e-6)
            if abs(p - threshold) > 1e-6:
                assert one["labels"] == (["x", "y"] if p > threshold else [])

    def test_what_a_merged_model_must_answer_alike(self) -> None:
        def alike(problem: str, one: list[float], other: list[float], **settings: Any) -> bool:
            return task_of(problem, **settings).answers_alike(torch.tensor(one), torch.tensor(other))

        assert alike("single_label", [1.0, 2.0], [-5.0, 0.0])
        assert not alike("single_label", [1.0, 2.0], [2.0, 1.0])
        assert alike("multi_label", [1.0, 2.0], [2.0, 1.0])
        assert not alike("multi_label", [1.0, 0.01], [1.0, -0.01])
        assert alike("multi_label", [1.0, 0.01], [1.0, -0.01], threshold=0.6)
        assert alike("regression", [4.0], [4.00001])
        assert not alike("regression", [4.0], [4.01])

    @pytest.mark.parametrize("seed", range(5))
    def test_majority_of_labels_is_the_best_set_for_all_rows(self, seed: int) -> None:
        chance = random.Random(seed)
        rows = rows_with(*([name for name in ABC if chance.random() < chance.random()] for _ in range(15)))
        task = task_of("multi_label")
        (prediction,) = task.majority(rows, rows.head(1), ABC)
        marks = np.array(task.meaning.targets(rows, ABC))
        best = max(
            sklearn.metrics.f1_score(marks, np.tile(one, (15, 1)), average="micro", zero_division=0)
            for one in itertools.product([0, 1], repeat=3)
        )
        assert task.score([prediction] * 15, rows, ABC).value == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize("seed", range(4))
    def test_numbers_are_scored_as_by_the_formulas(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        right = np.round(5 * draw.random(50), 1)  # with ties
        found = right + draw.normal(size=50)
        scores = task_of("regression").score([{"value": v} for v in found.tolist()], rows_with(*right.tolist()), ("l",))
        centred = (right - right.mean(), found - found.mean())
        pearson = (centred[0] @ centred[1]) / math.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
        ranks = [scipy.stats.rankdata(one) for one in (right, found)]
        assert scores.headline == "pearson"
        assert scores.values == pytest.approx(
            {
                "pearson": pearson,
                "spearman": np.corrcoef(*ranks)[0, 1],
                "mse": np.mean((right - found) ** 2),
                "mae": np.mean(abs(right - found)),
            }
        )

    @pytest.mark.parametrize(("found", "right"), [([2.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [2.0, 2.0]), ([1.0], [1.5])])
    def test_a_correlation_with_something_constant_is_0(self, found: list[float], right: list[float]) -> None:
        values: Any = RegressionReport().compute(predictions=found, references=right)
        assert (values["pearson"], values["spearman"]) == (0.0, 0.0)
        assert values["mse"] == pytest.approx(np.mean(np.subtract(found, right) ** 2))

    def test_majority_of_numbers_is_their_mean(self) -> None:
        train, test = rows_with(1, 2, 6), rows_with(3, 5)
        predictions = task_of("regression").majority(train, test, ("label",))
        assert predictions == [{"value": 3.0}] * 2
        assert task_of("regression").score(predictions, test, ("label",)).values["mse"] == pytest.approx(2.0)

    def test_metrics_of_others_get_marks_and_numbers(self) -> None:
        task = task_of("multi_label")
        found = task.metric_inputs([{"labels": ["b"]}, {"labels": []}], rows_with(["a", "b"], []), ABC)
        assert found == ([[0, 1, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]])
        assert task_of("regression").metric_inputs([{"value": 1.5}], rows_with("2"), ("label",)) == ([1.5], [2.0])

    def test_a_prediction_of_no_class_is_wrong(self) -> None:
        found: Any = ClassificationReport(labels=["x", "y"]).compute(predictions=[0, -1, 1], references=[0, 0, 1])
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def multi_label_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences with a label for each kind of word they have."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words, labels = chance.choices(FILLERS, k=3), []
        for label, group in (("a", POSITIVE), ("b", NEGATIVE), ("c", CITIES)):
            if chance.random() < 0.4:
                words.insert(chance.randrange(len(words)), chance.choice(group))
                labels.append(label)
        rows.append({"text": " ".join(words), "label": labels})
    return rows


def number_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences with 0 to 5 words of praise, and how many of them there are."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        praise = chance.randint(0, 5)
        words = chance.choices(FILLERS, k=6 - praise) + chance.choices(POSITIVE, k=praise)
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": f"{praise}.0"})
    return rows


ROWS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "single_label": sentiment_rows,
    "multi_label": multi_label_rows,
    "regression": number_rows,
}


def rows_of(records: list[dict[str, Any]]) -> Rows:
    return Rows("train.jsonl", records, range(1, len(records) + 1))


def _encoded(marks: list[list[int]]) -> Any:
    from peftkit.tasks.base import Encoded

    return Encoded([{"input_ids": [1], "labels": row} for row in marks], 0)


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Callable[..., Path]:
    """Writes the configuration of a toy run of a problem."""
    root = tmp_path_factory.mktemp("problems")

    def write(problem: str, **task: Any) -> Path:
        for seed, (split, count) in enumerate({"train": 160, "dev": 30, "test": 40}.items()):
            write_jsonl(root / f"{problem}_{split}.jsonl", ROWS[problem](count, seed))
        files = {split: str(root / f"{problem}_{split}.jsonl") for split in ("train", "dev", "test")}
        settings = {"kind": "sequence_classification", "problem": problem, "data": files, "max_length": 32}
        tree = {
            "backbone": {"name": str(tiny_bert)},
            "task": settings | task,
            "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
            "training": {"learning_rate": 0.01, "epochs": 6, "batch_size": 16, "seed": 1},
            "output": {"folder": str(root / f"{problem}_run")},
        }
        file = root / f"{problem}{len(task)}.yaml"
        file.write_text(json.dumps(tree))
        return file

    return write


@pytest.fixture(scope="module")
def finished(configured: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a finished run of a problem, trained once."""
    folders: dict[str, Path] = {}

    def train(problem: str) -> Path:
        if problem not in folders:
            file = configured(problem)
            assert main(["train", str(file)]) == 0
            folders[problem] = file.parent / f"{problem}_run"
        return folders[problem]

    return train


@pytest.mark.parametrize("problem", list(ROWS))
def test_a_run_learns_and_is_read_back_equal(problem: str, finished: Callable[[str], Path]) -> None:
    folder = finished(problem)
    scores = json.loads((folder / "scores.json").read_text())
    headline = scores["after"]["headline"]
    assert scores["after"]["values"][headline] > scores["majority"]["values"][headline] + 0.15
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    saved = load_run(folder)
    rows = saved.run.task.splits().held_out
    assert [line["reference"] for line in lines] == saved.run.task.references(rows, saved.head.labels)
    assert evaluate_rows(saved, rows).scores.values == pytest.approx(scores["after"]["values"], abs=1e-5)


@pytest.mark.parametrize("problem", list(ROWS))
def test_transformers_own_pipeline_gives_the_same_figures(
    problem: str, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(problem)
    merged = tmp_path / "merged"
    assert main(["merge", str(folder), str(merged)]) == 0
    assert "30 of 30 predictions equal" in capsys.readouterr().out
    saved = load_run(folder)
    texts = [row["text"] for row in ROWS[problem](12, 5)]
    ours = predict_rows(saved, saved.run.task.rows_from_text(texts))
    theirs: Any = pipeline("text-classification", model=str(merged), top_k=None)(texts)
    for one, other in zip(ours, theirs, strict=True):
        figures = {entry["label"]: entry["score"] for entry in other}
        expected = {"label": one["value"]} if problem == "regression" else one["probabilities"]
        assert figures == pytest.approx(expected, abs=1e-5)
        if problem == "multi_label":
            assert one["labels"] == [label for label in ABC if figures[label] >= 0.5]


def test_predictions_on_the_command_line(finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["great good fine happy bright", "the film was a story"]
    assert main(["predict", str(finished("regression")), *texts]) == 0
    high, low = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert set(high) == {"text", "value"}
    assert high["value"] > low["value"]
    assert main(["predict", str(finished("multi_label")), "good sad paris"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert set(json.loads(line)) == {"text", "labels", "probabilities"}
