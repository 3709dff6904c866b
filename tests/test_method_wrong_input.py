"""What every method must refuse, told in one clear line: sizes, targets, schedules, and files that do not belong."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SEQUENCE, Place, backbone_of, on_meta, save_checkpoint
from contract_variants import VARIANTS, Variant
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftkit.api import attach
from peftkit.backbones.layouts import layout_for
from peftkit.errors import MethodError, PeftkitError
from peftkit.methods import METHODS, AnyMethod
from peftkit.methods.base import Method

FIRST = {variant.kind: variant for variant in reversed(VARIANTS)}
"""One variant of each kind."""
SIZED = {kind: str(method.size) for kind, method in METHODS.items() if method.size}
WITH_TARGETS = [kind for kind, method in METHODS.items() if "targets" in method.model_fields]
ANY_SIZE = {"vera": "its projections may be wider than the matrices", "prefix": "encoders do not count its positions"}
SAME_AT_ANY_DEPTH = ("head", "prompt", "p_tuning")
TRAINING = [kind for kind, method in METHODS.items() if method.trains]
ADDING = [kind for kind in TRAINING if kind not in ("full", "head", "bitfit", "layernorm", "top_layers")]


def configured(kind: str, **changes: Any) -> Method:
    settings = {"kind": kind, **FIRST[kind].settings, **changes}
    method: Method = TypeAdapter(AnyMethod).validate_json(json.dumps(settings), strict=True)
    return method


def count(method: Method, architecture: str = "bert") -> int:
    return method.added_parameters(on_meta(Place(architecture, SEQUENCE)), layout_for(architecture))


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    assert len(str(error)) < 500, str(error)
    return str(error)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("kind", SIZED)
def test_a_size_of_nothing_or_less(kind: str, value: int) -> None:
    with pytest.raises(ValidationError, match="greater than 0") as caught:
        configured(kind, **{SIZED[kind]: value})
    assert caught.value.errors()[0]["loc"][-1] == SIZED[kind]


@pytest.mark.parametrize("kind", [kind for kind in SIZED if kind not in ANY_SIZE])
def test_a_size_beyond_the_model(kind: str) -> None:
    changes = {"initial_rank": None} if kind == "adalora" else {}
    method = configured(kind, **{SIZED[kind]: 5000} | changes)
    with pytest.raises(MethodError) as caught:
        count(method) + method.tuned_parameters(on_meta(Place("bert", SEQUENCE)), ("classifier",))
    message = one_line(caught.value)
    assert "5000" in message or "7500" in message  # AdaLoRA starts at half as much again
    assert f"lower method.{SIZED[kind]}" in message


def test_a_prefix_that_leaves_no_position() -> None:
    with pytest.raises(MethodError, match=r"32.*lower method\.length"):
        count(configured("prefix", length=32), "gpt2")


@pytest.mark.parametrize("kind", WITH_TARGETS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("qeury", "target 'qeury' matches no module of bert .*did you mean 'query'"),
        ("query+vlaue", "target 'vlaue' matches no module of bert .*did you mean 'value'"),
        (["query", "attention.self.vlaue"], "did you mean 'attention.self.value'"),
        ("query+", "target '' matches no module"),
        ([], "no targets; name at least one of"),
        ("gate", "has no gate projection; it has query, key, value, output, up, down"),
        ("query+classifier.dense", "'classifier.dense' matches no module"),
    ],
)
def test_targets_that_match_nothing(kind: str, targets: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message) as caught:
        count(configured(kind, targets=targets))
    one_line(caught.value)


@pytest.mark.parametrize("kind", WITH_TARGETS)
def test_the_head_is_no_target(kind: str) -> None:
    with pytest.raises(MethodError, match="target 'classifier' is in the head, which trains as a whole"):
        count(configured(kind, targets="query+classifier"))


@pytest.mark.parametrize("kind", [kind for kind, one in METHODS.items() if one.check_steps is not Method.check_steps])
def test_a_schedule_that_is_longer_than_the_run(kind: str, checkpoint: Callable[..., Path]) -> None:
    method = configured(kind, allocate_every=None)
    with pytest.raises(MethodError, match=r"\b2 optimizer steps.*train for more steps, or lower method\."):
        method.check_steps(2)
    with pytest.raises(MethodError, match=r"\b2 optimizer steps"):
        method.attach(backbone_of(checkpoint(), SEQUENCE, 0), 2)


def test_some_method_has_a_schedule() -> None:
    assert METHODS["adalora"].check_steps is not Method.check_steps


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny sequence classifier, of some architecture and with some changes."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def saved(architecture: str = "bert", **changes: Any) -> Path:
        return save_checkpoint(Place(architecture, SEQUENCE), root, **changes)

    return saved


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Callable[[Variant], Path]:
    """What a variant saves of a model that has not been trained."""

    @functools.cache
    def saved(kind: str) -> Path:
        folder, variant = tmp_path_factory.mktemp(kind), FIRST[kind]
        torch.manual_seed(0)
        method = configured(kind)
        model = method.attach(backbone_of(checkpoint(), SEQUENCE, 0), variant.steps)
        for step in range(1, variant.steps + 1):  # AdaLoRA saves nothing before its rank has fallen
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            method.after_step(model, step)
        method.save(model, folder)
        return folder

    return saved


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "narrower": ("bert", {"hidden_size": 16}),
    "deeper": ("bert", {"num_hidden_layers": 3}),
    "flatter": ("bert", {"num_hidden_layers": 1}),
    "another architecture": ("distilbert", {}),
    "another head": ("roberta", {}),
}


@pytest.mark.parametrize(
    ("kind", "other"),
    [(k, o) for k in TRAINING for o in OTHERS if k not in SAME_AT_ANY_DEPTH or o not in ("deeper", "flatter")],
)
def test_an_artifact_of_another_backbone(
    kind: str, other: str, artifact: Callable[[str], Path], checkpoint: Callable[..., Path]
) -> None:
    architecture, changes = OTHERS[other]
    backbone = backbone_of(checkpoint(architecture, **changes), SEQUENCE, 0)
    with pytest.raises(PeftkitError) as caught:
        configured(kind).load(backbone, artifact(kind))
    one_line(caught.value)


@pytest.mark.parametrize("change", ["lacks", "adds"])
@pytest.mark.parametrize("kind", TRAINING)
def test_an_artifact_that_lacks_or_adds_a_tensor(
    kind: str, change: str, artifact: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(artifact(kind), tmp_path / "changed")
    file = next(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = load_file(file)
    if change == "lacks":
        del tensors[min(tensors)]
    else:
        prefix = "base_model.model." if (folder / "adapter_config.json").is_file() else ""
        # a tensor of the frozen backbone, which a careless reader would take for a new one
        extra = "bert.embeddings.extra.weight" if kind == "full" else "bert.embeddings.word_embeddings.weight"
        tensors[f"{prefix}{extra}"] = torch.zeros(48, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PeftkitError) as caught:
        configured(kind).load(backbone_of(checkpoint(), SEQUENCE, 0), folder)
    one_line(caught.value)


@pytest.mark.parametrize("kind", ADDING)
def test_a_second_time_on_the_same_model(kind: str, checkpoint: Callable[..., Path]) -> None:
    method = configured(kind)
    model: Any = attach(backbone_of(checkpoint(), SEQUENCE, 0).model, method, FIRST[kind].steps)
    with pytest.raises(MethodError, match="already; attach to a model as transformers loads it"):
        attach(model, method, FIRST[kind].steps)
