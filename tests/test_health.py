"""A training that would be worthless says so, where and why; one that memory does not suffice for is cut smaller."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.cli import main
from peftkit.config import load_run
from peftkit.errors import TrainingError
from peftkit.methods import BitFit, LoRA
from peftkit.methods.base import trained_parameters
from peftkit.training import diagnosis, loop, shortage
from peftkit.training.health import Health, _checksum

WriteConfig = Callable[..., Path]
Told = pytest.CaptureFixture[str]


def attached(change: Callable[[nn.Module], None]) -> Callable[[LoRA, Any, int], nn.Module]:
    """`LoRA.attach`, with something done to the model behind it."""
    original = LoRA.attach

    def attach(self: LoRA, backbone: Any, total_steps: int) -> nn.Module:
        model = original(self, backbone, total_steps)
        change(model)
        return model

    return attach


def failed(config: Path, capsys: Told, *overrides: str) -> str:
    assert main(["train", str(config), *overrides]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- numbers that are none ----------------------------------------------------------------------------------------


class Poison(nn.Module):
    """Lets numbers through until it was called `calls` times, and then makes NaN of them."""

    def __init__(self, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.left = inner, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        found: torch.Tensor = self.inner(x)
        return found if self.left >= 0 else found * float("nan")


def test_the_module_where_nan_begins_is_named(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: nn.Module) -> None:
        name = "base_model.model.bert.encoder.layer.1.output.dropout"
        model.set_submodule(name, Poison(model.get_submodule(name), calls=3))

    monkeypatch.setattr(LoRA, "attach", attached(poison))
    error = failed(write_config(), capsys)
    assert (
        "the loss is nan at step 4: it begins in 'base_model.model.bert.encoder.layer.1.output.dropout' (Poison)"
        in error
    )
    assert "which makes it of numbers, for " in error
    assert "sentiment_train.jsonl:" in error
    assert "lower training.learning_rate" in error


def test_a_weight_that_is_none_is_named_before_any_module(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: LoRA, model: nn.Module, step: int) -> None:
        next(p for name, p in trained_parameters(model).items() if "lora_B" in name).data[0] = float("inf")

    monkeypatch.setattr(LoRA, "after_step", spoil)
    error = failed(write_config(), capsys)
    assert "the loss is nan at step 2: the weight 'base_model.model.bert.encoder.layer.0.attention.self.query" in error
    assert "lora_B.default.weight' holds NaN or infinity since the last update; lower training.learning_rate" in error


def test_a_backbone_that_is_none_is_not_blamed_on_the_learning_rate(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: nn.Module) -> None:
        model.get_submodule("base_model.model.bert.embeddings.word_embeddings").weight.data[5:] = float("inf")  # type: ignore[operator]

    monkeypatch.setattr(LoRA, "attach", attached(poison))
    monkeypatch.setattr("peftkit.experiment.evaluate", lambda *_: None)  # which would find it first
    error = failed(write_config(), capsys)
    assert "word_embeddings.weight' holds NaN or infinity, as it was loaded; get the backbone's files again" in error


def test_gradients_that_are_none_name_the_parameter_nearest_to_the_loss() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    def again() -> None:
        for place, value in ((0, "nan"), (1, "inf"), (2, "1")):
            layer: Any = model[place]
            assert layer.weight.grad is None
            layer.weight.grad, layer.bias.grad = torch.full((2, 2), float(value)), torch.zeros(2)

    assert diagnosis.of_gradients(model, again) == "the gradient of '1.weight' is the first to be none"


def test_a_weight_that_is_none_is_named_where_the_loss_hides_it() -> None:
    """tanh makes a number of infinity."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    model[0].weight.data[0, 0] = float("inf")

    def again() -> None:
        model(torch.ones(1, 2)).sum().backward()

    assert model(torch.ones(1, 2)).isfinite().all()
    found = diagnosis.of_gradients(model, again)
    assert found == "the weight '0.weight' holds NaN or infinity since the last update"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_none_is_named_though_clipping_has_spoilt_the_others(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    def poison(model: nn.Module) -> None:
        name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
        model.get_parameter(name).register_hook(lambda gradient: gradient * float(value))

    monkeypatch.setattr(LoRA, "attach", attached(poison))
    error = failed(write_config(), capsys)
    assert f"the gradient norm is {value} at step 1: the gradient of 'base_model.model.bert.encoder.layer.0." in error
    assert "attention.self.query.lora_B.default.weight' is the first to be none" in error


def test_what_is_finite_has_no_origin() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert diagnosis.origin(model, [("a row", lambda: model(torch.ones(1, 2)))]) == ""


# --- what trains, and what does not -------------------------------------------------------------------------------


def test_a_parameter_without_a_gradient_stops_the_training(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(model: nn.Module) -> None:
        model.register_parameter("idle", nn.Parameter(torch.ones(2)))

    monkeypatch.setattr(LoRA, "attach", attached(idle))
    assert "'idle' should train and got no gradient: no output" in failed(write_config(), capsys)


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_parameter_that_stands_still_stops_the_training(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch, warmup: int
) -> None:
    """As soon as the warm-up has let it move, three steps long."""

    def idle(model: nn.Module) -> None:
        part = model.get_submodule("base_model.model.classifier")
        part.register_parameter("still", nn.Parameter(torch.ones(2, 2)))
        part.register_forward_hook(lambda module, _, output: output + 0.0 * module.still.sum())

    monkeypatch.setattr(LoRA, "attach", attached(idle))
    overrides = [f"training.warmup_steps={warmup}", "training.evaluate_every=40", "method.targets=query"]
    error = failed(write_config(), capsys, *overrides)
    assert "classifier.still' should train and has not changed in 3 steps: its gradient is zero" in error


def test_a_step_that_rounds_to_nothing_stops_the_training(write_config: WriteConfig, capsys: Told) -> None:
    assert "has not changed in 3 steps" in failed(write_config(), capsys, "training.learning_rate=1e-30")


def test_frozen_weights_that_moved_are_told(
    write_config: WriteConfig, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one weight is enough."""

    def move(self: LoRA, model: nn.Module, step: int) -> None:
        if step == 5:
            weight: Any = model.get_submodule("base_model.model.bert.embeddings.word_embeddings").weight
            weight.data.view(torch.int32).view(-1)[7] ^= 1

    monkeypatch.setattr(LoRA, "after_step", move)
    error = failed(write_config(), capsys, "training.max_steps=6")
    assert "word_embeddings.weight' should be frozen and changed during training" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("count", [1, 3, 8, 29])
def test_any_single_bit_changes_the_checksum(dtype: torch.dtype, count: int) -> None:
    one = torch.arange(count).to(dtype)
    before = _checksum(one)
    bits = one.view(torch.uint8)
    for place in range(len(bits)):
        for bit in (1, 128):
            bits[place] ^= bit
            assert _checksum(one) != before
            bits[place] ^= bit
    assert _checksum(one) == before


# --- leaps of the loss --------------------------------------------------------------------------------------------


def leaps(losses: Iterator[float] | list[float]) -> list[int]:
    health = Health(nn.Linear(1, 1), BitFit())
    return [step for step, loss in enumerate(losses) if health.leaps(loss)]


def test_losses_that_leap_are_found_and_others_are_not() -> None:
    torch.manual_seed(0)
    noise = (2.0 * 0.98**step + 0.1 * float(torch.randn(())) + 0.5 for step in range(300))
    assert leaps(noise) == []
    flat = [1.0 + 0.01 * (step % 5) for step in range(60)]
    assert leaps([*flat[:40], 5.0, *flat[40:], 3.0]) == [40, 61]
    assert leaps([9.0, 1.0, 9.0, 1.0]) == []  # too few to judge by


def test_a_leap_is_logged(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Health, "leaps", lambda self, loss: len(seen.append(loss) or seen) == 3)
    seen: list[float] = []
    assert main(["train", str(write_config()), "training.max_steps=5"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event.get("leap")] == [3]


# --- memory -------------------------------------------------------------------------------------------------------


def greedy(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A loss that takes more memory than there is for more than `most` examples; what it is given is noted."""
    original = loop._Loop._micro_loss
    sizes: list[int] = []

    def micro_loss(self: Any, part: Any, number: int, model: Any = None) -> Any:
        sizes.append(len(part.indices))
        loss = original(self, part, number, model)
        if len(part.indices) > most:
            loss.backward(retain_graph=True)  # an attempt leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(loop._Loop, "_micro_loss", micro_loss)
    return sizes


def losses(folder: Path) -> list[float]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if "loss" in event]


def test_micro_batches_are_split_and_the_training_is_the_same(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    config = write_config()
    overrides = ["training.max_steps=6", "training.evaluate_every=3", "training.on_out_of_memory=split"]
    same = tmp_path / "same"
    assert main(["train", str(config), *overrides, "training.micro_batch_size=4", f"output.folder={same}"]) == 0
    sizes = greedy(monkeypatch, most=5)
    assert main(["train", str(config), *overrides]) == 0
    assert sizes[:3] == [16, 8, 4] and set(sizes[2:]) == {4}
    assert "step 1: out of memory; micro-batches have 4 examples from now on" in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(same)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", same)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_leave_to_split_it_is_told_what_to_change(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    greedy(monkeypatch, most=5)
    error = failed(write_config(), capsys)
    assert "out of memory at step 1: lower training.micro_batch_size (micro-batches have 16 examples), set" in error
    assert "training.on_out_of_memory: split" in error
    assert "training.gradient_checkpointing: true" in error


def test_several_processes_are_not_split(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("peftkit.session.check_processes", lambda actual: None)
    monkeypatch.setattr("peftkit.training.watch.start", lambda accelerator: None)
    assert main(["train", str(write_config()), "training.on_out_of_memory=split"]) == 2
    assert "on_out_of_memory: split is for one process" in capsys.readouterr().err


def test_one_example_that_does_not_fit_is_told(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    greedy(monkeypatch, most=0)
    error = failed(write_config(), capsys, "training.on_out_of_memory=split")
    assert "out of memory at step 1: set training.gradient_checkpointing: true, lower task.max_length, or hold" in error


def test_what_torch_says_on_a_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert shortage.is_shortage(caught.value)
    assert shortage.is_shortage(MemoryError())
    assert not shortage.is_shortage(RuntimeError("shapes do not match"))


def test_other_errors_are_not_taken_for_it(write_config: WriteConfig) -> None:
    settings = load_run(write_config()).training

    def work(size: int) -> float:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        shortage.retried(work, 4, settings, lambda: None, 1)


def test_every_method_may_name_what_stands_still() -> None:
    class Still(BitFit):
        def may_stand_still(self, parameter: str) -> bool:
            return parameter == "weight"

    model = nn.Linear(2, 2)
    health = Health(model, Still())
    model.bias.data += 1
    for _ in range(3):
        health.after_step(0.1)
    health = Health(model, BitFit())
    model.bias.data += 1
    health.after_step(0.0)
    health.after_step(0.1)
    health.after_step(0.1)
    with pytest.raises(TrainingError, match="'weight' should train and has not changed"):
        health.after_step(0.1)
    assert len(trained_parameters(model)) == 2
