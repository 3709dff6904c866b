"""Metrics against scikit-learn, seqeval and hand-counted spans; metrics that the user brings."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from seqeval.metrics import classification_report

from peftkit.errors import UsageError
from peftkit.metrics.classes import ClassificationReport
from peftkit.metrics.extra import MetricSettings, extra_values
from peftkit.metrics.spans import EntityReport

TAGS = ["O", "O", "O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-ORG"]
MODULE = """
import datasets
import evaluate

class {name}(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=datasets.Features(
            {{"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}}))

    def _compute(self, predictions, references, scale=1):
        return {result}
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


class TestClassificationReport:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("classes", [2, 3, 7])
    def test_equals_sklearn(self, seed: int, classes: int) -> None:
        draw = np.random.default_rng(seed)
        references, predictions = draw.integers(0, classes, (2, 60)).tolist()
        labels = [f"class {i}" for i in range(classes)]
        found: Any = ClassificationReport(labels=labels).compute(predictions=predictions, references=references)
        expected = sklearn.metrics.classification_report(
            references, predictions, labels=range(classes), target_names=labels, output_dict=True, zero_division=0
        )
        assert found["accuracy"] == pytest.approx(np.mean(np.equal(references, predictions)), abs=1e-12)
        assert found["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"], abs=1e-12)
        assert found["weighted_f1"] == pytest.approx(expected["weighted avg"]["f1-score"], abs=1e-12)
        assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(references, predictions), abs=1e-12)
        assert [row["name"] for row in found["per_class"]] == labels
        for row in found["per_class"]:
            one = expected[row["name"]]
            assert (row["precision"], row["recall"]) == pytest.approx((one["precision"], one["recall"]), abs=1e-12)
            assert (row["f1"], row["support"]) == pytest.approx((one["f1-score"], one["support"]), abs=1e-12)

    def test_by_hand(self) -> None:
        found: Any = ClassificationReport(labels=["no", "yes"]).compute(
            predictions=[1, 1, 1, 0, 0], references=[1, 1, 0, 0, 1]
        )
        yes, no = 2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1)  # 2TP / (2TP + FP + FN)
        assert found["accuracy"] == pytest.approx(3 / 5)
        assert found["macro_f1"] == pytest.approx((yes + no) / 2)
        assert found["weighted_f1"] == pytest.approx((3 * yes + 2 * no) / 5)
        assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)

    def test_one_class_only(self) -> None:
        found: Any = ClassificationReport(labels=["no", "yes"]).compute(predictions=[1, 1], references=[1, 1])
        assert (found["accuracy"], found["macro_f1"], found["matthews"]) == (1.0, 1.0, 0.0)
        assert found["per_class"][0] == {"name": "no", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}

    def test_class_that_is_never_predicted(self) -> None:
        found: Any = ClassificationReport(labels=["a", "b"]).compute(predictions=[0, 0], references=[0, 1])
        assert found["per_class"][1] == {"name": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


class TestEntityReport:
    @pytest.mark.parametrize("seed", range(8))
    def test_equals_seqeval(self, seed: int) -> None:
        chance = random.Random(seed)
        references = [chance.choices(TAGS, k=chance.randint(1, 12)) for _ in range(30)]
        predictions = [[tag if chance.random() < 0.7 else chance.choice(TAGS) for tag in row] for row in references]
        found: Any = EntityReport().compute(predictions=predictions, references=references)
        expected = classification_report(references, predictions, output_dict=True, zero_division=0)
        micro = expected["micro avg"]
        assert found["entity_f1"] == pytest.approx(micro["f1-score"], abs=1e-12)
        assert found["entity_precision"] == pytest.approx(micro["precision"], abs=1e-12)
        assert found["entity_recall"] == pytest.approx(micro["recall"], abs=1e-12)
        for row in found["per_class"]:
            one = expected[row["name"]]
            assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
                (one["precision"], one["recall"], one["f1-score"], one["support"]), abs=1e-12
            )

    def test_by_hand_as_conlleval_counts(self) -> None:
        references = [
            ["B-PER", "I-PER", "O", "B-LOC", "O"],
            ["B-ORG", "I-ORG", "I-ORG", "O", "B-LOC"],
            ["O", "B-PER"],
        ]
        predictions = [
            ["B-PER", "I-PER", "O", "B-ORG", "O"],  # PER right; LOC called ORG
            ["B-ORG", "I-ORG", "O", "O", "B-LOC"],  # ORG one word short, so wrong; LOC right
            ["O", "I-PER"],  # an I- that continues nothing starts an entity, so PER right
        ]
        found: Any = EntityReport().compute(predictions=predictions, references=references)
        assert found["entity_precision"] == pytest.approx(3 / 5)
        assert found["entity_recall"] == pytest.approx(3 / 5)
        assert found["entity_f1"] == pytest.approx(3 / 5)
        assert found["tag_accuracy"] == pytest.approx(9 / 12)
        rows = {row["name"]: (row["precision"], row["recall"], row["support"]) for row in found["per_class"]}
        assert rows == {"LOC": (1.0, 0.5, 2), "ORG": (0.0, 0.0, 1), "PER": (1.0, 1.0, 2)}

    def test_without_any_entity(self) -> None:
        found: Any = EntityReport().compute(predictions=[["O", "O"]], references=[["O", "O"]])
        assert (found["entity_f1"], found["tag_accuracy"], found["per_class"]) == (0.0, 1.0, [])

    def test_a_type_named_like_an_average(self) -> None:
        tags = [["B-micro avg", "O", "B-LOC"]]
        found: Any = EntityReport().compute(predictions=[["O", "O", "B-LOC"]], references=tags)
        assert found["entity_recall"] == pytest.approx(1 / 2)
        assert [row["name"] for row in found["per_class"]] == ["LOC", "micro avg"]


def test_both_are_evaluate_metrics() -> None:
    assert isinstance(ClassificationReport(labels=["a", "b"]), evaluate.Metric)
    assert isinstance(EntityReport(), evaluate.Metric)
    assert EntityReport().info.features is not None


def write_module(folder: Path, name: str, result: str) -> Path:
    file = folder / name / f"{name}.py"
    file.parent.mkdir()
    file.write_text(MODULE.format(name=name.title(), result=result))
    return file


class TestUserMetrics:
    hits = "{'hits': scale * sum(p == r for p, r in zip(predictions, references)), 'all': predictions}"

    @pytest.mark.parametrize("by_folder", [True, False])
    def test_a_local_module_by_name(self, tmp_path: Path, by_folder: bool) -> None:
        file = write_module(tmp_path, "hits", self.hits)
        settings = MetricSettings(name=str(file.parent if by_folder else file), options={"scale": 10})
        assert extra_values([settings], [0, 1, 1], [0, 1, 0], known={}) == {"hits": 20.0}

    def test_an_evaluate_object(self) -> None:
        metric = ClassificationReport(labels=["a", "b"])
        found = extra_values([metric], [0, 1, 1, 0], [0, 1, 0, 0], known={"loss": 1.0})
        assert found["accuracy"] == 0.75
        assert "per_class" not in found

    def test_names_that_are_taken_are_prefixed_and_nothing_is_lost(self, tmp_path: Path) -> None:
        one = MetricSettings(name=str(write_module(tmp_path, "mine", "{'accuracy': float(scale)}")))
        several = [one, *(one.model_copy(update={"options": {"scale": scale}}) for scale in (2, 3))]
        assert extra_values(several, [0], [0], known={"accuracy": 0.5}) == {
            "mine_accuracy": 1.0,
            "mine_accuracy_2": 2.0,
            "mine_accuracy_3": 3.0,
        }

    def test_numpy_numbers_count(self, tmp_path: Path) -> None:
        file = write_module(tmp_path, "numbers", "{'a': __import__('numpy').float32(0.5)}")
        assert extra_values([MetricSettings(name=str(file))], [0], [0], known={}) == {"a": 0.5}

    def test_a_metric_without_a_number_is_refused(self, tmp_path: Path) -> None:
        file = write_module(tmp_path, "lists", "{'per_class': [0.1, 0.2]}")
        with pytest.raises(UsageError, match="metric 'lists' gives no single number"):
            extra_values([MetricSettings(name=str(file))], [0], [0], known={})

    def test_a_metric_that_fails_is_named(self, tmp_path: Path) -> None:
        file = write_module(tmp_path, "broken", "1 / 0")
        with pytest.raises(UsageError, match="metric 'broken' failed on the predictions: division by zero"):
            extra_values([MetricSettings(name=str(file))], [0], [0], known={})

    def test_unknown_one(self, tmp_path: Path) -> None:
        name = str(tmp_path / "no_such_metric")
        with pytest.raises(UsageError, match=r"task\.metrics: cannot load '.*no_such_metric': .+") as caught:
            extra_values([MetricSettings(name=name)], [0], [0], known={})
        assert "\n" not in str(caught.value)
