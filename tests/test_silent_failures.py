"""Fifteen ways in which a run is worthless and nothing says so: each is refused or right, and has a test of that."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkit
from peftkit.backbones.load import BackboneSettings, Head, load
from peftkit.methods.base import Method

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "reliability_files.md"
SEQUENCE = Head("AutoModelForSequenceClassification", ("negative", "positive"))
TESTS = {
    "NaN as 0.0": "test_health.py::test_the_module_where_nan_begins_is_named",
    "all labels −100": "test_bad_input.py::test_all_labels_masked",
    "pad = end token": "test_bad_input.py::test_padding_that_is_the_end_token_stays_supervised",
    "partial typo in target modules": "test_layouts.py::test_refused_targets",
    "head not trained or not saved": "test_silent_failures.py::test_the_head_trains_and_is_saved",
    "regression by num_labels 1": "test_bad_input.py::test_one_line_with_place_and_mend[one class]",
    "AdaLoRA never allocating": "test_adalora.py::test_a_loop_that_never_reallocates_is_told",
    "allocator state lost": "test_adalora.py::test_a_loop_of_ones_own_resumes_with_state",
    "optimizer/scheduler/RNG file missing": "test_checkpoints.py::test_the_newest_that_is_whole_is_read",
    "resume with other data": "test_training.py::test_other_data_do_not_resume",
    "wrong base of the same shape": "test_artifacts.py::test_other_weights_under_the_same_name_are_refused",
    "missing adapter keys": "test_vetting.py::test_what_does_not_fit_the_backbone_is_refused[a missing module]",
    "extra keys overwriting the base": (
        "test_vetting.py::test_what_does_not_fit_the_backbone_is_refused[a weight of the backbone]"
    ),
    "a quantised in-place merge": "test_quantization.py::test_the_merged_model_computes_what_the_quantised_one_does",
    "fewer processes than asked": (
        "test_jobs.py::test_stock_trains_with_other_processes_than_asked_and_peftkit_refuses[--cpu]"
    ),
}
"""The failure → the test of this folder that fails if it is back."""


@pytest.mark.parametrize("failure", TESTS)
def test_each_has_its_test(failure: str) -> None:
    """Read and not imported, because some of them take long to import."""
    file, _, name = TESTS[failure].partition("::")
    name, _, case = name.removesuffix("]").partition("[")
    code = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    (test,) = [node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert any(isinstance(node, (ast.Assert, ast.With)) for node in ast.walk(test))
    if case:
        tables = (FOLDER / file, FOLDER.parent / "benchmarks" / "reliability" / "hostile_kinds.py")
        assert any(f'"{case}": (' in table.read_text(encoding="utf-8") for table in tables)


def test_the_page_names_them_all() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for failure, test in TESTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {failure} |")]
        assert f"| `{test}` |" in row


@pytest.mark.parametrize(
    "method",
    [
        peftkit.LoRA(rank=2),
        peftkit.IA3(),
        peftkit.Bottleneck(bottleneck_size=4),
        peftkit.Prefix(length=2),
        peftkit.BitFit(),
        peftkit.HeadOnly(),
    ],
    ids=lambda method: method.kind,
)
def test_the_head_trains_and_is_saved(method: Method, tiny_bert: Path, tmp_path: Path) -> None:
    """A fresh head that is drawn anew would answer otherwise."""
    settings = BackboneSettings(name=str(tiny_bert))
    model: Any = method.attach(load(settings, SEQUENCE), total_steps=10)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias"}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    (tmp_path / "saved").mkdir()
    method.save(model, tmp_path / "saved")
    reread: Any = method.load(load(settings, SEQUENCE), tmp_path / "saved")
    ids = torch.arange(5, 25).view(4, 5)
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=ids).logits for one in (reread, model))
    assert torch.equal(found, expected) and float(expected.abs().max()) > 10
