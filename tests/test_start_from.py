"""Training that goes on from a saved run, for every method with weights of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import sentiment_rows, write_jsonl
from torch import nn

from peftkit.artifacts.continued import start_from
from peftkit.artifacts.store import load_run as load_saved
from peftkit.backbones.load import load
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.data.collate import collate
from peftkit.errors import ArtifactError, PeftkitError, UsageError
from peftkit.experiment import train as train_run
from peftkit.methods.base import trained_parameters
from peftkit.prepare import Prepared, prepare

WriteConfig = Callable[..., Path]
TRAINING = {"learning_rate": 0.02, "max_steps": 8, "batch_size": 8, "seed": 1, "evaluate_every": 8}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
    "dora": {"kind": "lora", "rank": 2, "variant": "rslora_dora", "targets": "attention"},
    "adalora": {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "targets": "all"},
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 4},
    "prefix": {"kind": "prefix", "length": 3},
    "prompt": {"kind": "prompt", "length": 3},
    "full": {"kind": "full"},
    "head": {"kind": "head"},
    "top_layers": {"kind": "top_layers", "layers": 1},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
    "loha": {"kind": "peft", "type": "loha", "r": 2},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("small")
    sizes = {"train": 24, "dev": 8, "test": 8}
    rows = {row["text"]: row for row in sentiment_rows(80, 3)}.values()
    left = iter(rows)
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", [next(left) for _ in range(size)]))
        for name, size in sizes.items()
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, small: dict[str, str]) -> Callable[..., Path]:
    count = iter(range(1000))

    def write(method: dict[str, Any], **sections: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"run{next(count)}")
        task = {"kind": "sequence_classification", "data": small, "max_length": 32}
        whole = {
            "backbone": {"name": str(tiny_bert)},
            "task": task,
            "method": method,
            "training": TRAINING,
            "output": {"folder": str(folder / "run")},
        } | sections
        (folder / "config.yaml").write_text(yaml.safe_dump(whole))
        return folder / "config.yaml"

    return write


@pytest.fixture(scope="module")
def first(config: Callable[..., Path]) -> Callable[..., Path]:
    """The folder of a run with a method, trained once for all tests."""
    found: dict[str, Path] = {}

    def trained(method: dict[str, Any]) -> Path:
        key = json.dumps(method)
        if key not in found:
            found[key] = train_run(load_run(config(method))).folder
        return found[key]

    return trained


def attached(file: Path) -> tuple[nn.Module, Prepared]:
    """A model with the weights that its run starts from, and with another head than any before it."""
    run = load_run(file)
    data = prepare(run)
    torch.manual_seed(99)
    backbone = load(run.backbone, data.head)
    model = run.method.attach(backbone, total_steps=TRAINING["max_steps"])  # type: ignore[arg-type]
    start_from(run, data, backbone, model)
    return model, data


def logits(model: nn.Module, data: Prepared) -> torch.Tensor:
    batch = collate(data.test.encoded.examples, data.test.pad_id)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", METHODS)
def test_with_no_step_the_model_is_the_old_run(
    name: str, config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    method = METHODS[name]
    old_run = first(method)
    model, data = attached(config(method | {"start_from": str(old_run)}))
    old = load_saved(old_run).model
    before = attached(config(method))[0]
    assert not torch.allclose(logits(before, data), logits(old, data), atol=1e-3)
    exact = 1e-6 if name == "adalora" else 0.0  # its ΛQ is taken apart again
    torch.testing.assert_close(logits(model, data), logits(old, data), rtol=0, atol=exact)
    # it trains what a fresh one does
    assert trained_parameters(model).keys() == trained_parameters(before).keys()


def test_it_learns_on_from_there_and_the_manifest_says_so(
    config: Callable[..., Path],
    first: Callable[..., Path],
    tmp_path: Path,
    small: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    old_run = first(METHODS["lora"])
    fresh = write_jsonl(tmp_path / "new.jsonl", sentiment_rows(24, 11))
    method = METHODS["lora"] | {"start_from": str(old_run), "dropout": 0.1}
    data = small | {"train": str(fresh)}
    task = {"kind": "sequence_classification", "data": data, "max_length": 32}
    second = config(method, task=task)
    assert main(["train", str(second)]) == 0
    folder = second.parent / "run"
    scores, before = (json.loads((one / "scores.json").read_text()) for one in (folder, old_run))
    assert scores["before"]["values"] == before["after"]["values"]
    manifest = json.loads((folder / "manifest.json").read_text())
    old = json.loads((old_run / "manifest.json").read_text())
    assert manifest["started_from"]["run_id"] == old["run_id"]
    assert manifest["started_from"]["folder"] == str(old_run) and manifest["started_from"]["head"] == "saved"
    assert main(["predict", str(folder), "a good film"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["label"] in ("negative", "positive")


def test_a_decomposed_start_goes_on_as_the_lora_that_was_saved(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    method = METHODS["lora"] | {"initialization": "pissa"}
    old_run = first(method)
    start = {"start_from": str(old_run)}
    with pytest.raises(PeftkitError, match="initialization pissa moves a part of the backbone"):
        load_run(config(method | start))
    with pytest.raises(
        UsageError, match=r"saved with peft's (r 8, and here it is 4|lora_alpha 16\.?0?, and here it is 8)"
    ):
        attached(config(METHODS["lora"] | start))
    doubled = METHODS["lora"] | start | {"rank": 8, "alpha": 16}
    model, data = attached(config(doubled))
    torch.testing.assert_close(logits(model, data), logits(load_saved(old_run).model, data), rtol=0, atol=1e-6)


def test_other_labels_want_a_fresh_head_on_purpose(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    old_run = first(METHODS["lora"])
    rows = [row | {"label": row["label"].upper()} for row in sentiment_rows(24, 4)]
    train = str(write_jsonl(tmp_path / "upper.jsonl", rows))
    task = {"kind": "sequence_classification", "data": {"train": train}, "max_length": 32}
    method = METHODS["lora"] | {"start_from": str(old_run)}
    message = r"has labels negative, positive, and this task has NEGATIVE, POSITIVE; .* or method.fresh_head: true"
    with pytest.raises(UsageError, match=message):
        attached(config(method, task=task))
    model, _ = attached(config(method | {"fresh_head": True}, task=task))
    old = dict(load_saved(old_run).model.named_parameters())
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(parameter, old[name]) == (".classifier." not in name), name


@pytest.mark.parametrize("name", ["full", "bottleneck", "adalora"])
def test_a_fresh_head_of_another_width_fits_every_kind_of_file(
    name: str, config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    old_run = first(METHODS[name])
    rows = [row | {"label": str(index % 3)} for index, row in enumerate(sentiment_rows(24, 4))]
    task = {
        "kind": "sequence_classification",
        "data": {"train": str(write_jsonl(tmp_path / "three.jsonl", rows))},
        "max_length": 32,
    }
    method = METHODS[name] | {"start_from": str(old_run), "fresh_head": True}
    model, data = attached(config(method, task=task))
    assert logits(model, data).shape[1] == 3
    plain = attached(config(METHODS[name], task=task))[0]
    assert not torch.allclose(logits(model, data), logits(plain, data), atol=1e-4)


REFUSED = {
    "another method": ({"kind": "ia3"}, "was trained with method 'lora', and a 'ia3' cannot go on from it"),
    "another rank": ({**METHODS["lora"], "rank": 2, "alpha": 4}, "saved with peft's"),
    "another scale": ({**METHODS["lora"], "alpha": 9}, "saved with peft's lora_alpha 8.0, and here it is 9.0"),
    "other targets": ({**METHODS["lora"], "targets": "query"}, "saved with peft's target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused(
    case: str, config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    old_run = first(METHODS["lora"] | {"alpha": 8.0})
    method, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        attached(config(method | {"start_from": str(old_run)}))


def test_own_settings_that_shapes_do_not_tell_are_compared(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    old_run = first(METHODS["bottleneck"])
    method = METHODS["bottleneck"] | {"start_from": str(old_run), "nonlinearity": "tanh"}
    with pytest.raises(UsageError, match=r"its method.nonlinearity is 'relu', not 'tanh'"):
        attached(config(method))


def test_networks_that_are_not_saved_cannot_go_on(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    method = METHODS["prefix"] | {"reparametrization_size": 4}
    old_run = first(method)
    start = {"start_from": str(old_run)}
    with pytest.raises(UsageError, match="MLP of reparametrization_size is not saved"):
        attached(config(method | start))
    model, data = attached(config(METHODS["prefix"] | start))
    torch.testing.assert_close(logits(model, data), logits(load_saved(old_run).model, data), rtol=0, atol=0)


def test_other_weights_of_the_backbone_are_refused(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path, tiny_bert: Path
) -> None:
    from transformers import AutoTokenizer, BertModel

    old_run = first(METHODS["lora"])
    other = BertModel.from_pretrained(tiny_bert)
    other.embeddings.word_embeddings.weight.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "other")
    method = METHODS["lora"] | {"start_from": str(old_run)}
    with pytest.raises(ArtifactError, match="was trained on other weights than those of"):
        attached(config(method, backbone={"name": str(tmp_path / "other")}))


def test_a_start_that_is_no_run_is_told_at_once(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is not a finished run \(it has no manifest.json\)"):
        train_run(load_run(config(METHODS["lora"] | {"start_from": str(tmp_path / "nowhere")})))
    with pytest.raises(PeftkitError, match="fresh_head is for start_from"):
        load_run(config(METHODS["lora"] | {"fresh_head": True}))


def test_a_loop_that_left_the_step_out_is_told(
    config: Callable[..., Path], first: Callable[..., Path], tmp_path: Path
) -> None:
    from peftkit.session import start
    from peftkit.training.loop import train

    old_run = first(METHODS["head"])
    run = load_run(config(METHODS["head"] | {"start_from": str(old_run)}))
    data = prepare(run)
    model = run.method.attach(load(run.backbone, data.head), 8)
    with pytest.raises(UsageError, match="start_from is set and not done"):
        train(model, run, data, start(run))
