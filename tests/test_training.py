"""The training loop against hand-written references: steps, batches, schedules, resuming, stopping, logging."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_conll

from peftkit.backbones.load import Backbone, load
from peftkit.cli import main
from peftkit.config import Run, TrainingSettings, load_run
from peftkit.errors import TrainingError
from peftkit.evaluation import evaluate
from peftkit.experiment import Result
from peftkit.experiment import train as train_run
from peftkit.methods import HeadOnly
from peftkit.methods.base import trained_parameters
from peftkit.prepare import Prepared, prepare
from peftkit.session import start
from peftkit.tasks.losses import CrossEntropy, Focal, LabelSmoothed, Weighted
from peftkit.training import batches, checkpoint
from peftkit.training.loop import train
from peftkit.training.optimizer import make_optimizer, make_schedule, parameter_groups
from peftkit.training.record import TrainRecord

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}
TRAINING = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "seed": 1}

WriteConfig = Callable[..., Path]
Trained = tuple[TrainRecord, torch.nn.Module]


@pytest.fixture
def fit(write_config: WriteConfig, tmp_path: Path) -> Callable[..., Trained]:
    """Trains a toy run in a folder of its own, without the evaluations around it."""
    count = iter(range(100))

    def _fit(task: str = "sentiment", method: dict[str, Any] = LORA, **training: Any) -> Trained:
        run = _run(write_config, tmp_path / f"run{next(count)}", task, method, **training)
        accelerator = start(run)
        data, _, model = _attached(run)
        return train(model, run, data, accelerator), model

    return _fit


def _run(
    write_config: WriteConfig, folder: Path, task: str = "sentiment", method: dict[str, Any] = LORA, **training: Any
) -> Run:
    loss = training.pop("loss", CrossEntropy())
    file = write_config(task, method=method, training=TRAINING | training, output={"folder": str(folder)})
    run = load_run(file)
    return run.model_copy(update={"task": run.task.model_copy(update={"loss": loss})})


def _attached(run: Run) -> tuple[Prepared, Backbone, torch.nn.Module]:
    data = prepare(run)
    backbone = load(run.backbone, data.head)
    return data, backbone, run.method.attach(backbone, run.training.total_steps(len(data.train)))


def _events(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if key in event]


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def _assert_close(one: torch.nn.Module, other: torch.nn.Module, atol: float = 1e-6) -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    for name in first:
        # attention does not depend on the key bias: its gradient is rounding noise, which AdamW makes steps of
        if not name.endswith("key.bias"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=f"{name} differs")


# --- the optimizer step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_equals_a_loop_written_by_hand(
    kind: str, write_config: WriteConfig, tmp_path: Path, fit: Callable[..., Trained]
) -> None:
    method = LORA if kind == "lora" else {"kind": "full"}
    options = {"weight_decay": 0.1, "warmup_steps": 4, "max_gradient_norm": 0.5, "keep_best": False, "max_steps": 12}
    record, model = fit(method=method, **options)

    run = _run(write_config, tmp_path / "reference", method=method, **options)
    start(run)
    data, _, reference = _attached(run)
    losses = _train_by_hand(reference, data, 12, 4, decay=0.1, clip=0.5)
    assert record.losses == pytest.approx(losses, abs=1e-5)
    _assert_close(model, reference, atol=2e-5)


def _train_by_hand(
    model: torch.nn.Module, data: Prepared, steps: int, warmup: int, decay: float, clip: float
) -> list[float]:
    """AdamW as in Loshchilov & Hutter (2019), algorithm 2, with the gradient clipped to a norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    examples, losses = data.train.encoded.examples, []
    ahead = batches.steps(data.train.encoded.lengths, 16, 1, False)
    model.train()
    for step in range(steps):
        _, indices = next(ahead)
        longest = max(len(examples[i]["input_ids"]) for i in indices)
        pad = [longest - len(examples[i]["input_ids"]) for i in indices]
        ids = torch.tensor([examples[i]["input_ids"] + [0] * p for i, p in zip(indices, pad, strict=True)])
        mask = torch.tensor([[1] * (longest - p) + [0] * p for p in pad])
        labels = torch.tensor([examples[i]["labels"] for i in indices])
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        rate = 0.01 * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        for p, g, (mean, square) in zip(parameters, gradients, moments, strict=True):
            g = g * min(1.0, clip / (norm + 1e-6))
            mean.mul_(0.9).add_(g, alpha=0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            corrected = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():
                p.mul_(1 - rate * (decay if p.ndim > 1 else 0.0))
                p.sub_(rate * mean / (1 - 0.9 ** (step + 1)) / corrected)
        losses.append(float(loss.detach()))
    return losses


def test_weight_decay_is_for_matrices_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    run = _run(write_config, tmp_path / "run", method={"kind": "full"})
    _, _, model = _attached(run)
    decaying, other = parameter_groups(model, TrainingSettings(learning_rate=0.1, weight_decay=0.1), HeadOnly())
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in other["params"]} == {1}
    assert len(decaying["params"]) + len(other["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("task", "loss"),
    [
        ("sentiment", CrossEntropy()),
        ("sentiment", Weighted(weights=(0.3, 2.5))),
        ("sentiment", LabelSmoothed(smoothing=0.2)),
        ("sentiment", Focal()),
        ("entities", CrossEntropy()),
        ("entities", Weighted()),
    ],
)
def test_micro_batches_do_not_change_training(task: str, loss: CrossEntropy, fit: Callable[..., Trained]) -> None:
    options = {"loss": loss, "max_steps": 4, "keep_best": False, "optimizer": "sgd"}
    whole, reference = fit(task, micro_batch_size=16, **options)
    for cut in ({"micro_batch_size": 8}, {"micro_batch_size": 5}, {"micro_batch_size": 1}, {"micro_batch_tokens": 30}):
        record, model = fit(task, **cut, **options)
        assert record.losses == pytest.approx(whole.losses, abs=1e-6)
        _assert_close(model, reference)


def test_gradient_checkpointing_does_not_change_training(fit: Callable[..., Trained]) -> None:
    for method in (LORA, {"kind": "full"}):
        plain, _ = fit(method=method, max_steps=5, learning_rate=1e-3)
        saving, _ = fit(method=method, max_steps=5, learning_rate=1e-3, gradient_checkpointing=True)
        assert saving.losses == pytest.approx(plain.losses, abs=1e-6)


# --- batches ------------------------------------------------------------------------------------------------------


LENGTHS = np.random.default_rng(3).integers(3, 60, size=203).tolist()


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_every_example_once_in_an_order_of_seed_and_epoch(grouped: bool) -> None:
    first = batches.epoch_batches(LENGTHS, 8, 5, 0, grouped)
    assert sorted(index for batch in first for index in batch) == list(range(203))
    assert Counter(map(len, first)) == {8: 25, 3: 1}
    assert first == batches.epoch_batches(LENGTHS, 8, 5, 0, grouped)
    assert first != batches.epoch_batches(LENGTHS, 8, 5, 1, grouped)
    assert first != batches.epoch_batches(LENGTHS, 8, 6, 0, grouped)


def test_grouping_by_length_pads_less() -> None:
    def padding(grouped: bool) -> int:
        epoch = batches.epoch_batches(LENGTHS, 8, 5, 0, grouped)
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in epoch)

    assert padding(True) < 0.3 * padding(False)


def test_steps_go_on_where_they_are_told_to() -> None:
    whole = [one for one, _ in zip(batches.steps(LENGTHS, 8, 5, True), range(70), strict=False)]
    assert [epoch for epoch, _ in whole] == [0] * 26 + [1] * 26 + [2] * 18
    for begin in (0, 1, 26, 40):
        later = batches.steps(LENGTHS, 8, 5, True, begin)
        assert [next(later) for _ in range(20)] == whole[begin : begin + 20]


@pytest.mark.parametrize("size", [None, 1, 3, 8])
@pytest.mark.parametrize("tokens", [None, 1, 60, 10_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 16])
@pytest.mark.parametrize("examples", [1, 5, 8])
def test_processes_share_a_batch_evenly(size: int | None, tokens: int | None, processes: int, examples: int) -> None:
    batch = list(range(examples))
    shares = [batches.micro_batches(batch, LENGTHS, size, processes, rank, tokens) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1 and shares[0]
    parts = [part for share in shares for part in share]
    assert sorted(index for part in parts if part.counted for index in part.indices) == batch
    assert all(part.indices and len(part.indices) <= (size or examples) for part in parts)
    assert sum(not part.counted for part in parts) < processes


def test_a_budget_of_tokens_takes_few_long_examples_or_many_short_ones() -> None:
    lengths = [10, 200, 50, 11, 90, 12, 9, 100]
    parts = batches.micro_batches(range(8), lengths, None, 1, 0, micro_batch_tokens=110)
    assert [part.indices for part in parts] == [(1,), (7,), (4,), (2, 5), (3, 0, 6)]
    parts = batches.micro_batches(range(8), lengths, 2, 1, 0, micro_batch_tokens=110)
    assert [part.indices for part in parts] == [(1,), (7,), (4,), (2, 5), (3, 0), (6,)]


@pytest.mark.parametrize(
    ("settings", "steps"), [({"epochs": 0.5}, 5), ({"epochs": 1.3}, 13), ({"epochs": 0.01}, 1), ({"max_steps": 7}, 7)]
)
def test_length_of_training(settings: dict[str, Any], steps: int, fit: Callable[..., Trained]) -> None:
    record, _ = fit(**settings)
    assert record.steps == len(record.losses) == steps


def test_data_order_is_the_same_for_every_method(write_config: WriteConfig, tmp_path: Path) -> None:
    seen = {}
    for kind in ("lora", "full", "head"):
        run = _run(write_config, tmp_path / kind, method={"kind": kind}, max_steps=12)
        start(run)
        data, _, model = _attached(run)
        seen[kind] = _watched_batches(model, run, data)
    assert seen["lora"] == seen["full"] == seen["head"]
    assert len(seen["lora"]) == 12


def _watched_batches(model: torch.nn.Module, run: Run, data: Prepared) -> list[list[list[int]]]:
    """The token ids of every training forward pass."""
    seen: list[list[list[int]]] = []

    def watch(module: torch.nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if module.training:
            seen.append(keywords["input_ids"].tolist())

    with model.register_forward_pre_hook(watch, with_kwargs=True):
        train(model, run, data, start(run))
    return seen


# --- optimizers, schedules, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.01), ("sgd", 0.1), ("adafactor", 0.01)])
def test_optimizers_learn(name: str, rate: float, fit: Callable[..., Trained]) -> None:
    record, _ = fit(optimizer=name, learning_rate=rate, epochs=4)
    assert np.mean(record.losses[-5:]) < 0.85 * np.mean(record.losses[:5])


def _refusal(capfd: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line in which a command is refused with exit code 2 before it writes anything."""
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not folder.exists()
    return error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer=adamw_8bit", "adamw_8bit needs a GPU"),
        ("training.precision=fp16", "fp16 needs a GPU"),
        ("output.trackers=[nonesuch]", "nonesuch"),
    ],
)
def test_what_this_machine_has_not_is_refused_before_anything_is_written(
    override: str, message: str, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not torch.cuda.is_available(), "this test is about a machine without a GPU"
    assert message in _refusal(capfd, tmp_path / "run", "train", str(write_config()), override)


def test_a_tracker_that_is_not_installed_is_told(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    error = _refusal(capfd, tmp_path / "run", "train", str(write_config()), "output.trackers=[tensorboard]")
    assert "tensorboard is not installed" in error


def test_launcher_and_run_must_agree_on_precision(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    error = _refusal(capfd, tmp_path / "run", "train", str(write_config()))
    assert "bf16" in error and "fp32" in error
    assert main(["train", str(write_config()), "training.precision=bf16", "training.max_steps=1"]) == 0


def test_bf16_learns_on_a_cpu(fit: Callable[..., Trained]) -> None:
    exact, _ = fit(epochs=3)
    rounded, model = fit(epochs=3, precision="bf16")
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, abs=0.1)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
    # transformers' default: power 1 down to 1e-7
    "polynomial": lambda done: (1 - done) * (1 - 1e-7 / 0.3) + 1e-7 / 0.3,
}


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 10}, {"warmup_ratio": 0.25}])
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_their_formula(name: str, warmup: dict[str, Any]) -> None:
    settings = TrainingSettings(learning_rate=0.3, optimizer="sgd", schedule=name, **warmup)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), settings, HeadOnly())
    schedule = make_schedule(optimizer, settings, total_steps=40)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rise = 10 if warmup else 0
    formula = SCHEDULES[name]
    expected = [0.3 * (s / rise if s < rise else formula((s - rise) / (40 - rise))) for s in range(40)]
    assert rates == pytest.approx(expected, abs=1e-9)


# --- seeds, evaluation, stopping ----------------------------------------------------------------------------------


def _bytes(folder: Path) -> bytes:
    return next(folder.glob("*/*.safetensors")).read_bytes()


def test_a_seed_decides_every_byte(write_config: WriteConfig, tmp_path: Path) -> None:
    method = LORA | {"dropout": 0.1}
    results = [
        train_run(_run(write_config, tmp_path / name, method=method, seed=seed))
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    ]
    one, same, other = ([_bytes(r.folder), r.record.losses] for r in results)
    assert one == same
    assert one[0] != other[0] and one[1] != other[1]


def test_evaluating_more_often_does_not_change_training(fit: Callable[..., Trained]) -> None:
    method = LORA | {"dropout": 0.1}
    seldom, reference = fit(method=method, epochs=2, keep_best=False)
    often, model = fit(method=method, epochs=2, keep_best=False, evaluate_every=3)
    assert [one["step"] for one in often.evaluations] == [3, 6, 9, 12, 15, 18, 20]
    assert often.losses == seldom.losses
    assert all(torch.equal(w, _weights(model)[name]) for name, w in _weights(reference).items())


def test_training_stops_when_dev_no_longer_gains_and_keeps_the_best(write_config: WriteConfig, tmp_path: Path) -> None:
    run = _run(write_config, tmp_path / "run", epochs=30, early_stopping_patience=3, learning_rate=0.03)
    accelerator = start(run)
    data, _, model = _attached(run)
    record = train(model, run, data, accelerator)
    scores = [one["dev_accuracy"] for one in record.evaluations]
    best = scores.index(max(scores))
    assert len(scores) == best + 1 + 3 < 30
    assert record.best_step == 10 * (best + 1)
    logged = [event["dev_accuracy"] for event in _events(tmp_path / "run", "dev_accuracy")]
    assert logged == scores
    assert evaluate(model, run.task, data.dev, accelerator).scores.value == max(scores)
    assert scores[-1] < max(scores)


def test_the_last_weights_stay_when_the_best_are_not_asked_for(fit: Callable[..., Trained]) -> None:
    best, best_model = fit(epochs=8, learning_rate=0.02)
    last, last_model = fit(epochs=8, learning_rate=0.02, keep_best=False)
    assert best.losses == last.losses and best.best_step < best.steps == last.best_step == 80
    assert any(not torch.equal(w, _weights(last_model)[name]) for name, w in _weights(best_model).items())


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with one checkpoint, of a run that Ctrl-C ended."""
    run = _run(write_config, tmp_path / "run", epochs=3)
    accelerator = start(run)
    data, _, model = _attached(run)
    saved = checkpoint.Checkpoints.save

    def interrupt(self: Any, progress: Any, *others: Any) -> None:
        saved(self, progress, *others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, "save", interrupt)
        train(model, run, data, accelerator)
    assert [one.name for one in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-10"]
    return tmp_path / "config.yaml"


def test_another_configuration_does_not_resume_in_the_folder(
    interrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(interrupted), "training.learning_rate=0.5", "method.rank=2"]) == 2
    error = capfd.readouterr().err
    assert "belongs to run" in error
    assert ": method.rank: 4 → 2, training.learning_rate: 0.01 → 0.5; " in error
    assert "output.allow_changes: [method.rank, training.learning_rate]" in error
    assert (tmp_path / "run" / "checkpoints" / "step-10").is_dir()


def test_other_data_do_not_resume(
    interrupted: Path, toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = toy_data / "sentiment_train.jsonl"
    text = file.read_text()
    try:
        file.write_text("\n".join([*text.splitlines()[1:], text.splitlines()[1], ""]))
        assert main(["train", str(interrupted)]) == 1
    finally:
        file.write_text(text)
    assert "step-10 is of another run: data (rows, labels or tokenizer): " in capfd.readouterr().err
    assert main(["train", str(interrupted)]) == 0


# --- what would be worthless --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(method={"kind": "full"}, training=TRAINING | {"learning_rate": 1e30})
    assert main(["train", str(config)]) == 1
    error = capfd.readouterr().err
    assert "is nan at step 2: it begins in '" in error
    assert "; lower training.learning_rate" in error
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert main(["train", str(config), "training.learning_rate=0.001"]) == 0  # the folder is free again


def test_weights_that_become_infinite_in_the_last_step_are_not_scored(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = TRAINING | {"learning_rate": 1e38, "max_steps": 1, "optimizer": "sgd", "max_gradient_norm": 1e9}
    assert main(["train", str(write_config(method={"kind": "full"}, training=training))]) == 1
    assert "after step 1: the model's probabilities are not numbers at" in capfd.readouterr().err


def test_a_poisoned_weight_is_told(write_config: WriteConfig, tmp_path: Path) -> None:
    run = _run(write_config, tmp_path / "run")
    accelerator = start(run)
    data, _, model = _attached(run)
    with torch.no_grad():
        next(iter(trained_parameters(model).values())).view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match="at step 1"):
        train(model, run, data, accelerator)


def test_a_batch_without_labels_is_told(write_config: WriteConfig, tmp_path: Path) -> None:
    tagged = [{"tokens": ["alice", "went"], "tags": ["B-PER", "O"]}] * 3
    unseen = {"tokens": ["\u200b"], "tags": ["O"]}  # the tokenizer drops it, and its tag with it
    files = {
        "train": str(write_conll(tmp_path / "train.conll", [*tagged, unseen])),
        "dev": str(write_conll(tmp_path / "dev.conll", tagged)),
    }
    config = write_config("entities", training=TRAINING | {"batch_size": 1})
    run = load_run(config, [f"task.data={json.dumps(files)}"])
    accelerator = start(run)
    data, _, model = _attached(run)
    with pytest.raises(TrainingError, match=r"nothing to learn at step \d: .*train\.conll:10"):
        train(model, run, data, accelerator)


# --- room on the disk ---------------------------------------------------------------------------------------------


def test_too_little_room_is_told_before_training(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config()
    _, _, model = _attached(load_run(config))
    trained = sum(p.numel() for p in trained_parameters(model).values())
    needed = trained * 4 * 3 * (3 + 1)  # weights, two moments and the best, of two checkpoints and a new one

    def usage(free: int) -> Any:
        return lambda place: shutil._ntuple_diskusage(10**12, 10**12 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
    assert main(["train", str(config)]) == 1
    assert "checkpoints and the result need 0.2 MiB" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["optimizer", "best"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    broken: str,
    write_config: WriteConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import safetensors.torch

    config = write_config(training=TRAINING | {"epochs": 4, "learning_rate": 0.003})
    save_file = safetensors.torch.save_file

    def full(tensors: Any, file: Path, *args: Any, **options: Any) -> None:
        if ".step-20" in str(file) and file.name == "states.safetensors" and broken == "optimizer":
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(file))
        if "best-" in str(file) and "best-10" not in str(file) and broken == "best":
            Path(file).write_bytes(b"half")
            # what safetensors 0.6 raises
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        save_file(tensors, file, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        assert main(["train", str(config)]) == 1
    assert "no space left on the disk" in capfd.readouterr().err
    left = {one.name for one in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "step-10" in left and "step-20" not in left
    assert not [name for name in left if name.startswith(".")]
    assert main(["train", str(config)]) == 0
    assert "continuing from step" in capfd.readouterr().out


# --- what is logged -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Result:
    """A run that TensorBoard follows."""
    folder = tmp_path_factory.mktemp("logged")
    files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    tree = {
        "backbone": {"name": str(tiny_bert)},
        "task": {"kind": "sequence_classification", "data": files, "max_length": 32},
        "method": LORA,
        "training": TRAINING | {"epochs": 2},
        "output": {"folder": str(folder / "run"), "trackers": ["tensorboard"]},
    }
    (folder / "config.yaml").write_text(json.dumps(tree))
    return train_run(load_run(folder / "config.yaml"))


def test_every_step_is_logged(logged: Result, toy_data: Path) -> None:
    steps, dev = _events(logged.folder), _events(logged.folder, "dev_accuracy")
    assert [event["step"] for event in steps] == list(range(1, 21))
    assert [event["epoch"] for event in steps] == [0] * 10 + [1] * 10
    assert [event["loss"] for event in steps] == list(logged.record.losses)
    assert [event["learning_rate"] for event in steps] == pytest.approx([0.01 * (20 - s) / 20 for s in range(20)])
    assert all(event["gradient_norm"] > 0 and event["tokens_per_second"] > 0 for event in steps)
    assert [event["step"] for event in dev] == [10, 20]
    # words are tokens here, and [CLS] and [SEP] are added; padding does not count
    rows = map(json.loads, (toy_data / "sentiment_train.jsonl").read_text().splitlines())
    assert logged.record.tokens == 2 * sum(len(row["text"].split()) + 2 for row in rows)


def test_tensorboard_gets_the_losses(logged: Result) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged.folder / "tracking"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({event["step"]: event["loss"] for event in _events(logged.folder)})
    assert {"learning_rate", "dev_accuracy"} <= set(events.Tags()["scalars"])


def test_the_learning_curve_is_a_picture(logged: Result) -> None:
    from matplotlib.image import imread

    picture = imread(logged.folder / "learning_curve.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 400
    blank = (picture[..., :3] == 1).all(-1).mean()
    colours = {tuple(colour) for colour in (picture[..., :3].reshape(-1, 3) * 255).astype(int)}
    assert 0.5 < blank < 0.99
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # the loss and the dev line
